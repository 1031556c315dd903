"""BatchPreview: print the first training batch, token by token, before the model trains on it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from automodel_trainer.callbacks.console import show_rich
from automodel_trainer.callbacks.layout import tokenizer_of
from automodel_trainer.callbacks.notebook import display, in_kernel
from automodel_trainer.data.global_batch import GlobalBatch
from automodel_trainer.data.preview import Preview, preview


class BatchPreview(Callback):
    """Prints the first batch of a run on rank 0: trained and masked tokens, document boundaries, and padding.

    Args:
        rows: number of rows to print.
        html: a file to write the whole batch to, as an HTML page.

    Raises:
        ValueError: `rows` is less than 1.
    """

    def __init__(self, rows: int = 1, html: str | None = None) -> None:
        if rows < 1:
            raise ValueError(f"BatchPreview(rows={rows}): rows must be at least 1. To print none, omit the callback.")
        self.rows = rows
        self.html = html
        self._shown = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Print the batch if it is the first one."""
        if self._shown:
            return
        self._shown = True
        if not trainer.is_global_zero:
            return
        if isinstance(batch, GlobalBatch):  # of which nothing is dealt yet
            batch.deal(0, 1)
        micro_batches = batch if isinstance(batch, list) else [batch]
        tokenizer = tokenizer_of(pl_module)
        if tokenizer is None:
            rank_zero_warn("BatchPreview shows nothing: the module has no `tokenizer` to turn tokens into text.")
        elif not all(isinstance(part, dict) and {"input_ids", "labels"} <= part.keys() for part in micro_batches):
            rank_zero_warn(
                "BatchPreview shows nothing: the batch is not a list of micro-batches with `input_ids` and `labels`."
            )
        else:
            pictures_of = getattr(getattr(trainer, "datamodule", None), "pictures_of", None)
            options: dict[str, Any] = {"max_rows": self.rows, "html": self.html, "pictures_of": pictures_of}
            if in_kernel() and self.html is None:
                display(Preview(micro_batches, tokenizer, self.rows, pictures_of))
                return
            show_rich(trainer, lambda console: preview(micro_batches, tokenizer, console=console, **options))
