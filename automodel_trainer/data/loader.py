"""The stateful loader. Each item is this rank's share of a global batch: the data of one optimizer step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from automodel_trainer.data.batches import MicroBatch, collate_packed, collate_padded, padded_width
from automodel_trainer.data.packing import epoch_order
from automodel_trainer.data.rows import Rows

Step = tuple[list[int], int]
"""The numbers of this rank's rows in one global batch (-1 = filler), and their width in tokens."""


class MicroBatchLoader:
    """Yields a list of micro-batches per optimizer step, epoch after epoch, and can resume from a saved state.

    The rows of a global batch depend only on the seed, the epoch and the global batch size. Of these rows, in order,
    rank `r` takes those at positions `r, r + dp_size, ...` and splits them into micro-batches. If the last global
    batch of an epoch is incomplete, it is filled up with rows without labels.

    Each `iter()` starts the next epoch. The exceptions are the first one, and the first one after `load_state_dict`,
    which continues with the next batch. The state counts the batches that were yielded. It does not count those that
    workers have already prefetched.

    Args:
        rows: the rows, the same on every rank.
        micro_batch_size: rows per micro-batch.
        global_batch_size: rows per global batch, a multiple of `micro_batch_size * dp_size`.
        dp_rank: this rank's index among the data-parallel ranks.
        dp_size: number of data-parallel ranks.
        seed: determines, with the epoch, the order of the rows.
        epoch: the epoch of the first `iter()`.
        shuffle: False keeps the order of the data set in every epoch.
        packed: make packed micro-batches; False: padded ones, grouped by length.
        pad_id: token id for padding.
        drop_last: drop an incomplete last global batch.
        num_workers: processes that build micro-batches; 0 builds them in this process.
        limit: maximum number of batches per epoch; None: no limit.

    Attributes:
        epoch: the current epoch, from 0.
        batches_yielded: global batches yielded so far in this epoch.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        packed: bool = True,
        pad_id: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        limit: int | None = None,
    ) -> None:
        assert global_batch_size % (micro_batch_size * dp_size) == 0, "checked by the data module"
        self.rows = rows
        self.global_batch_size = global_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.seed, self.shuffle, self.packed = seed, shuffle, packed
        self.drop_last = drop_last
        self.epoch = epoch
        self.batches_yielded = 0
        self._limit = limit
        self._resumed = False
        self._loader = step_loader(
            _Steps(rows, micro_batch_size, packed, pad_id), sampler=_Epoch(self), num_workers=num_workers
        )

    def __len__(self) -> int:
        """Global batches per epoch, including those before a resumed position."""
        full, rest = divmod(len(self.rows), self.global_batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        end = len(self) if self._limit is None else min(len(self), self._limit)
        # A new epoch begins after a complete one, and after an iteration that was abandoned.
        if self.batches_yielded >= end or (self.batches_yielded and not self._resumed):
            self.epoch += 1
            self.batches_yielded = 0
        return self._hand_out()

    @property
    def _iterator(self) -> Any:
        """The inner loader's iterator, a private attribute in torch (2.11-2.13).

        Lightning looks for it under this name, as in torch's own loaders, to shut down the workers.
        """
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator

    def _hand_out(self) -> Iterator[list[MicroBatch]]:
        for batch in self._loader:
            self.batches_yielded += 1
            self._resumed = False
            yield batch

    def steps(self) -> Iterator[Step]:
        """This rank's rows of each global batch that is left in this epoch."""
        left = self.global_batches(self.epoch)[self.batches_yielded :]
        return _shares(left, self.rows, self.packed, self.dp_rank, self.dp_size)

    def global_batches(self, epoch: int) -> np.ndarray:
        """Row numbers of all global batches of an epoch: int64 `[len(self), global_batch_size]`; -1 is a filler."""
        size = self.global_batch_size
        order = epoch_order(
            self.rows.lengths, size, seed=self.seed, epoch=epoch, shuffle=self.shuffle, grouped=not self.packed
        )
        batches = np.full(len(self) * size, -1, dtype=np.int64)
        batches[: len(order)] = order[: len(batches)]
        return batches.reshape(-1, size)

    def state_dict(self) -> dict[str, Any]:
        """The position as numbers and strings. It is the same on every rank."""
        return {
            "epoch": self.epoch,
            "batches_yielded": self.batches_yielded,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "fingerprint": self.rows.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that was yielded when the state was saved, on any number of ranks.

        Raises:
            ValueError: the data or its tokenization changed, or the global batch size changed within an epoch.
        """
        if state["fingerprint"] != self.rows.fingerprint:
            raise ValueError(
                "the data changed since the checkpoint was written: the rows, the tokenizer, its chat template, or a "
                "setting that determines the rows (seq_len, packing, loss_on, val_split, ...) is different. The "
                "position in the epoch is therefore not valid. Restore them, or start a new run from the checkpoint's "
                "weights."
            )
        size, batches = int(state["global_batch_size"]), int(state["batches_yielded"])
        # Computed with the saved batch size: it may change between epochs.
        finished = batches * size >= len(self.rows) - (size - 1 if self.drop_last else 0)
        if size != self.global_batch_size and batches and not finished:
            raise ValueError(
                f"the checkpoint is {batches} batches of global_batch_size={size} into its epoch, but "
                f"global_batch_size is now {self.global_batch_size}. Set global_batch_size={size} to go on, or resume "
                f"from a checkpoint written at the end of an epoch."
            )
        if int(state["seed"]) != self.seed:
            warnings.warn(
                f"the data order keeps the checkpoint's seed {state['seed']}; seed={self.seed} is ignored", stacklevel=2
            )
        self.seed = int(state["seed"])
        self.epoch = int(state["epoch"]) + (1 if finished else 0)
        self.batches_yielded = 0 if finished else batches
        self._resumed = True


def _shares(batches: np.ndarray, rows: Rows, packed: bool, dp_rank: int, dp_size: int) -> Iterator[Step]:
    for batch in batches:
        width = rows.width
        if not packed:
            width = padded_width(int(rows.lengths[batch[batch >= 0]].max()), width)
        yield batch[dp_rank::dp_size].tolist(), width


class _Epoch:
    """The sampler of the inner DataLoader: the rest of the loader's current epoch.

    It keeps only a weak reference to the loader, and so does its iterator. A reference cycle would leave the workers
    to the garbage collector, which closes their queues first and then waits 5 s for each worker.
    """

    def __init__(self, loader: MicroBatchLoader) -> None:
        self._loader = weakref.ref(loader)

    def __iter__(self) -> Iterator[Step]:
        loader = self._loader()
        assert loader is not None, "the caller that iterates holds the loader"
        return loader.steps()


class _Steps(Dataset):
    """Builds the micro-batches of one step, in the worker processes."""

    def __init__(self, rows: Rows, micro_batch_size: int, packed: bool, pad_id: int) -> None:
        self.rows, self.micro_batch_size, self.pad_id = rows, micro_batch_size, pad_id
        self.collate = collate_packed if packed else collate_padded

    def __getitem__(self, step: Step) -> list[MicroBatch]:
        rows, width = step
        return micro_batches(self.rows.fetch(rows), self.micro_batch_size, width, self.pad_id, self.collate)


def micro_batches(
    rows: list, size: int, width: int, pad_id: int, collate: Callable = collate_packed
) -> list[MicroBatch]:
    """Split rows into micro-batches.

    Args:
        rows: the documents of each row.
        size: rows per micro-batch.
        width: tokens per row.
        pad_id: token id for padding.
        collate: `collate_packed` or `collate_padded`.
    """
    return [collate(rows[start : start + size], width, pad_id) for start in range(0, len(rows), size)]


def step_loader(dataset: Dataset, num_workers: int, **options: Any) -> DataLoader:
    """A torch DataLoader for a data set whose items are whole steps: it adds workers and pinned memory, no batching."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_survive_signals,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # the loader would otherwise draw from the global generator in every epoch
        **options,
    )


def _survive_signals(worker: int) -> None:
    """Keep a worker alive when signals ask the run to save and stop (Ctrl-C, torchrun, Slurm): it is still needed.

    The worker leaves its parent's process group. It exits on a SIGTERM from its parent only, or when its parent dies.
    """
    os.setpgid(0, 0)
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot tell a process who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
        continue
    os._exit(0)


def _unchanged(item: Any) -> Any:
    return item
