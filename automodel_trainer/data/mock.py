"""MockDataModule: random tokens, to benchmark or try a layout without data."""

from __future__ import annotations

from typing import Any

from automodel_trainer.data.base import MicroBatchDataModule
from automodel_trainer.data.rows import RandomRows, Rows


class MockDataModule(MicroBatchDataModule):
    """Rows of random tokens, the same on every layout. All tokens are trained, but there is nothing to learn.

    Args:
        vocab_size: tokens are drawn from 1 to `vocab_size - 1`. None: the size of the model's tokenizer.
        seq_len: tokens per row.
        micro_batch_size: rows per forward pass on one rank.
        global_batch_size: rows per optimizer step over all ranks. None: one micro-batch on each data-parallel rank,
            times the Trainer's accumulation.
        num_samples: rows per epoch.
        val_samples: validation rows; 0: no validation.
        seed: determines the tokens and their order.
        num_workers: processes that build micro-batches ahead of time.

    Raises:
        ValueError: a size is too small.
    """

    rows_hold_documents = False

    def __init__(
        self,
        vocab_size: int | None = None,
        seq_len: int = 2048,
        micro_batch_size: int = 1,
        global_batch_size: int | None = None,
        num_samples: int = 1024,
        val_samples: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        if num_samples < 1 or val_samples < 0:
            raise ValueError(f"num_samples={num_samples} must be at least 1 and val_samples={val_samples} at least 0.")
        if vocab_size is not None and vocab_size < 2:
            raise ValueError(f"vocab_size={vocab_size} must be at least 2, because token 0 is never drawn.")
        self.vocab_size = vocab_size
        self.num_samples = num_samples
        self.val_samples = val_samples

    def build_rows(self) -> dict[str, Rows]:
        """The random rows of "train", and of "validation" if there are any.

        Raises:
            ValueError: there is neither a `vocab_size` nor a tokenizer.
        """
        size = self.vocab_size or len(self._named_tokenizer())
        rows: dict[str, Rows] = {"train": RandomRows(self.num_samples, self.seq_len, size, self.seed)}
        if self.val_samples:
            rows["validation"] = RandomRows(self.val_samples, self.seq_len, size, self.seed + 1)
        return rows

    def _named_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("MockDataModule needs `vocab_size=`, or a Trainer and a module that has a tokenizer.")
        return self.load_tokenizer()
