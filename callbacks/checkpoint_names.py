"""Names of checkpoint folders: `step-00000010`, or what `DCPCheckpoint(filename=)` says."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from automodel_trainer.checkpoint.runs import BEST, LATEST, step_folder


class FolderNames:
    """Makes the name of a checkpoint.

    Args:
        template: a name with metrics in braces, as ModelCheckpoint takes it (`{epoch}-{val_loss:.2f}`); None: the step.
        insert_names: put the name of each metric before its value (`epoch=3`).
        versions: add `-v1`, `-v2`, … to a name that is taken; otherwise the older checkpoint is replaced.

    Raises:
        ValueError: the template has a path separator, or is a name that this project uses itself.
    """

    def __init__(self, template: str | None, insert_names: bool, versions: bool) -> None:
        if template is not None and ("/" in template or "\\" in template or template in ("", BEST, LATEST)):
            raise ValueError(
                f"DCPCheckpoint(filename={template!r}): it is the name of a folder. Leave out '/', and '{BEST}' and "
                f"'{LATEST}', which are links. Give the folder above as dirpath."
            )
        self.template, self.versions = template, versions
        self._format = ModelCheckpoint(filename=template, auto_insert_metric_name=insert_names)

    def name(self, trainer: pl.Trainer, run: Path) -> str:
        """The name for a checkpoint of this step in the folder `run`. Collective with a template."""
        if self.template is None:
            return step_folder(trainer.global_step)
        metrics = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
        values = {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()} | metrics
        name = self._format.format_checkpoint_name(values).removesuffix(ModelCheckpoint.FILE_EXTENSION)
        version, free = 0, name
        while self.versions and (run / free).exists():
            version += 1
            free = f"{name}-v{version}"
        return str(trainer.strategy.broadcast(free))  # ranks may have other metrics, or see other files
