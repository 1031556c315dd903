"""HFExport: write the trained model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from transformers import PreTrainedModel

from automodel_trainer.callbacks.check_writable import check_folder, check_space, export_bytes
from automodel_trainer.callbacks.console import show
from automodel_trainer.callbacks.preemption import TIME, preemption_of
from automodel_trainer.checkpoint.export import export_pretrained
from automodel_trainer.checkpoint.remote import local_only
from automodel_trainer.strategies import MeshStrategy


class HFExport(Callback):
    """Exports the trained model at the end of `fit`, unless a signal stopped the run, and prints the folder.

    Args:
        dirpath: the folder to write; by default `<default_root_dir>/hf`.
        dtype: dtype of the weights on disk, by torch's name ("bfloat16"); None keeps the dtype of each weight.

    Attributes:
        exported_to: the folder, once it is written.

    Raises:
        ValueError: `dtype` is not a dtype, or the module has no Hugging Face model.
    """

    def __init__(self, dirpath: str | Path | None = None, dtype: str | torch.dtype | None = None) -> None:
        self.dirpath = None if dirpath is None else local_only(dirpath, "HFExport(dirpath=…)")
        found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        if dtype is not None and not isinstance(found, torch.dtype):
            raise ValueError(f"HFExport(dtype={dtype!r}) is not a torch dtype. Allowed: bfloat16, float16, float32.")
        self.dtype: torch.dtype | None = found

        self.exported_to: Path | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there is a model to export, and that it can be written.

        Raises:
            ValueError: the module has no Hugging Face model, or the folder or the space does not allow it.
        """
        if not isinstance(getattr(pl_module, "model", None), PreTrainedModel):
            raise ValueError(
                f"HFExport exports Hugging Face models, but {type(pl_module).__name__}.model is not one. Remove the "
                "callback."
            )
        if trainer.is_global_zero:
            folder = self.dirpath or Path(trainer.default_root_dir) / "hf"
            check_folder(folder.absolute(), "The exported model")
            check_space(folder.absolute(), export_bytes(pl_module.model, self.dtype), 1, "The exported model")  # type: ignore[arg-type]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the model."""
        preemption = preemption_of(trainer)
        if preemption is not None and preemption.stopped_by not in (None, TIME):
            return  # after a signal there may be no time for an export
        if isinstance(trainer.strategy, MeshStrategy) and not trainer.strategy.writes_checkpoints:
            return  # another replica group does it
        folder = (
            self.dirpath
            or local_only(trainer.default_root_dir, "HFExport without dirpath, in default_root_dir,") / "hf"
        )
        export_pretrained(
            pl_module.model,  # type: ignore[arg-type]
            folder,
            tokenizer=getattr(pl_module, "saved_tokenizer", getattr(pl_module, "tokenizer_or_none", None)),
            source=getattr(pl_module, "source", None),
            dtype=self.dtype,
        )
        self.exported_to = folder

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the folder and how to try the model. This is the last output of a run."""
        if stage == "fit" and self.exported_to is not None:
            show(trainer, f"Model exported to {self.exported_to}\nTry it: amt generate --model {self.exported_to}")
