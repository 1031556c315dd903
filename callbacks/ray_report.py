"""RayReport: tells Ray Train the metrics of a run, and where its checkpoints lie."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.distributed.ray_worker import ray_context

POINTER = "checkpoint.json"


class RayReport(Callback):
    """In a worker of Ray Train, reports to Ray when a checkpoint is whole, after a validation, and at the end.

    Ray gets the metrics and the step. It copies no weights: a checkpoint stays where the run wrote it, and Ray's holds
    one file, `checkpoint.json`, which names the folder. It is a default callback in a worker, and does
    nothing elsewhere.
    """

    def __init__(self) -> None:
        self._reported = ""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report a checkpoint that has become whole."""
        if self._newest(trainer) != self._reported:
            self._report(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the metrics of a validation."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._report(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the end."""
        self._report(trainer)

    def _newest(self, trainer: pl.Trainer) -> str:
        """The newest checkpoint that every rank knows of, at this step."""
        saver = trainer.checkpoint_callback
        return saver.last_model_path if isinstance(saver, DCPCheckpoint) else ""

    def _report(self, trainer: pl.Trainer) -> None:
        context = ray_context()
        if context is None:
            return
        import ray.train as train

        self._reported = self._newest(trainer)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if _is_number(value)}
        metrics["step"] = trainer.global_step
        if not self._reported or context.get_world_rank() > 0:
            train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / POINTER).write_text(json.dumps({"checkpoint": self._reported}))
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
