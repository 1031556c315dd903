"""The stateful loader. Each item is this rank's share of a global batch: the data of one optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from automodel_trainer.data.batches import MicroBatch, collate_packed, collate_padded, padded_width
from automodel_trainer.data.global_batch import GlobalBatch, whole_turns
from automodel_trainer.data.mixture import MixtureRows
from automodel_trainer.data.packing import epoch_order
from automodel_trainer.data.rows import Rows
from automodel_trainer.data.step_loader import step_loader
from automodel_trainer.data.worker_errors import items_of

_LOOKED_AT = 256  # of the longest rows, for one with several documents


class Lacking(NamedTuple):
    """Which micro-batches of a step must run the vision tower although their rows have no pictures.

    Attributes:
        here: of each of this rank's micro-batches, the kinds ("picture", "video") that it lacks and another rank has
            there.
        everywhere: no row of the global batch has pictures, and the layout runs the tower all the same.
    """

    here: Sequence[Sequence[str]] = ()
    everywhere: bool = False


Step = tuple[list[int], int, Lacking]
"""The numbers of this rank's rows in one global batch (-1 = filler), their width in tokens, and what lacks pictures."""
Kinds = Mapping[str, np.ndarray]
"""Of each kind of picture that reaches the model by itself ("picture", "video"), which rows have any: bool `[n]`."""
Collate = Callable[..., MicroBatch]
"""Makes a micro-batch of rows, their width and the id for padding; with pictures, also of the kinds it `lacks`."""


class MicroBatchLoader:
    """Yields a list of micro-batches per optimizer step, epoch after epoch, and can resume from a saved state.

    The rows of a global batch depend only on the seed, the epoch and the global batch size. Of these rows, in order,
    rank `r` takes those at positions `r, r + dp_size, ...` and splits them into micro-batches. If the last global
    batch of an epoch is incomplete, it is filled up with rows without labels. Rows with the most pictures come first
    in their global batch, so that ranks that wait for each other have about as many tokens of pictures.

    Each `iter()` starts the next epoch. The exceptions are the first one, and the first one after `load_state_dict`,
    which continues with the next batch. The state counts the batches that were yielded. It does not count those that
    workers have already prefetched.

    The batch size and the seed may change within an epoch: the rows that are left are handed out in the order that the
    epoch began with, so each row of the epoch is seen once. Later epochs are ordered by the new seed.

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
        positions: how many positions the model has; None: no limit.
        collate: makes a micro-batch; None: `collate_packed` or `collate_padded`.
        always_pictures: the layout needs a gradient of every parameter in every step.
        deals_late: yield each global batch undealt (`GlobalBatch`); the strategy deals it in every step. `dp_rank`,
            `dp_size` and `num_workers` then mean nothing.

    Attributes:
        epoch: the current epoch, from 0.
        batches_yielded: global batches yielded so far in this epoch. After a change of the batch size it is counted
            back from the end of the epoch, so that an epoch always ends at `len(self)`.
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
        positions: int | None = None,
        collate: Collate | None = None,
        always_pictures: bool = False,
        deals_late: bool = False,
    ) -> None:
        assert global_batch_size % (micro_batch_size * dp_size) == 0, "checked by the data module"
        self.rows = rows
        self.global_batch_size = global_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.micro_batch_size = micro_batch_size
        self.always_pictures = always_pictures
        self.seed, self.shuffle, self.packed = seed, shuffle, packed
        self.drop_last = drop_last
        self.epoch = epoch
        self.batches_yielded = 0
        self._limit = limit
        self._resumed = False
        self._begin_epoch()
        collate = collate or partial(collate_packed if packed else collate_padded, positions=positions)
        self.deals_late = deals_late
        self._steps = _Steps(rows, micro_batch_size, pad_id, collate)
        dataset = _Undealt() if deals_late else self._steps
        self._loader = step_loader(dataset, sampler=_Epoch(self), num_workers=0 if deals_late else num_workers)

    def __len__(self) -> int:
        """Global batches per epoch, including those before a resumed position."""
        full, rest = divmod(len(self.rows), self.global_batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        # A new epoch begins after a complete one, and after an iteration that was abandoned.
        if self.batches_yielded >= self.end or (self.batches_yielded and not self._resumed):
            self.epoch += 1
            self.batches_yielded = 0
            self._begin_epoch()
        return self._hand_out()

    def _begin_epoch(self) -> None:
        """Order the epoch by this run's settings, and begin with its first row."""
        self._order = (self.seed, self.global_batch_size)
        self._begun = (0, 0)  # batches and rows of this epoch that earlier runs have handed out

    @property
    def end(self) -> int:
        """Global batches that an epoch of this run hands out."""
        return len(self) if self._limit is None else min(len(self), self._limit)

    @property
    def rows_done(self) -> int:
        """Rows of this epoch that have been handed out."""
        batches, rows = self._begun
        return min(len(self.rows), rows + (self.batches_yielded - batches) * self.global_batch_size)

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
        for batch in items_of(self._loader):
            self.batches_yielded += 1
            self._resumed = False
            yield batch

    @property
    def has_one_width(self) -> bool:
        """Whether all micro-batches are equally wide."""
        return self.packed

    def largest_steps(self) -> list[list[MicroBatch]]:
        """Micro-batches that take the most memory, each list a step of at most two: gradients exist in the second.

        The longest rows, those with the most pictures, and, beside rows of one document, the longest with several:
        attention treats them differently. All are as wide as a row of this data can be.
        """
        # A mixture has other rows in each epoch, so it counts them on.
        offset = self.epoch * len(self.rows) if hasattr(self.rows, "lengths_of") else 0
        longest = np.argsort(-self._lengths(self.epoch), kind="stable") + offset
        chosen = [longest]
        if (tokens := self._picture_tokens(self.epoch)) is not None:
            chosen.append(np.argsort(-tokens, kind="stable") + offset)
        if self.packed:
            looked = longest[:_LOOKED_AT]
            several = np.array([len(documents) > 1 for documents in self.rows.fetch(looked.tolist())])
            if several.any() and not several[: self.micro_batch_size].all():
                chosen.append(looked[several])
        alone = self.global_batch_size == self.micro_batch_size * self.dp_size and not self.deals_late
        count = 1 if alone else 2
        return [self._made_of(rows) * count for rows in chosen]

    def _made_of(self, rows: np.ndarray) -> list[MicroBatch]:
        """A micro-batch of the first of these rows, as wide as can be."""
        widest = self.rows.width if self.packed else padded_width(self.rows.longest, self.rows.width)
        made: list[MicroBatch] = self._steps[np.resize(rows, self.micro_batch_size).tolist(), widest, Lacking()]
        return made

    @contextmanager
    def last_not_taken(self) -> Iterator[None]:
        """A context in which the state is that before the batch that was yielded last."""
        self.batches_yielded -= 1
        try:
            yield
        finally:
            self.batches_yielded += 1

    def steps(self) -> Iterator[Any]:
        """This rank's rows of each global batch that is left in this epoch (`Step`), or the batches undealt."""
        left = self._batches(self.epoch, *self._order)
        lengths = self._lengths(self.epoch)
        # A mixture has other rows in each epoch, so it counts them on.
        offset = self.epoch * len(self.rows) if hasattr(self.rows, "lengths_of") else 0
        kinds = self._kinds(self.epoch)
        left = even_out(left, self._picture_tokens(self.epoch))

        def shares(batches: np.ndarray, rank: int, size: int) -> Iterator[Step]:
            ranks = _Ranks(rank, size, self.micro_batch_size, self.always_pictures)
            return _shares(batches, lengths, kinds, self.rows.width, offset, self.packed, ranks)

        if not self.deals_late:
            return shares(left, self.dp_rank, self.dp_size)
        return (GlobalBatch(partial(self._share, shares, batch)) for batch in left)

    def _share(
        self, shares: Callable[[np.ndarray, int, int], Iterator[Step]], batch: np.ndarray, rank: int, size: int
    ) -> list[MicroBatch]:
        """One rank's micro-batches of a global batch, among any number of ranks."""
        whole = np.full((1, whole_turns(len(batch), self.micro_batch_size, size)), -1, dtype=np.int64)
        whole[0, : len(batch)] = batch
        return self._steps[next(shares(whole, rank, size))]

    def global_batches(self, epoch: int) -> np.ndarray:
        """Row numbers of all global batches of an epoch: int64 `[len(self), global_batch_size]`; -1 is a filler."""
        batches = self._cut(self._epoch_order(epoch, self.seed, self.global_batch_size), len(self))
        return even_out(batches, self._picture_tokens(epoch))

    def _batches(self, epoch: int, seed: int, order_size: int) -> np.ndarray:
        order = self._epoch_order(epoch, seed, order_size)[self.rows_done :]
        return self._cut(order, len(self) - self.batches_yielded)

    def _epoch_order(self, epoch: int, seed: int, size: int) -> np.ndarray:
        return epoch_order(
            self._lengths(epoch), size, seed=seed, epoch=epoch, shuffle=self.shuffle, grouped=not self.packed
        )

    def _lengths(self, epoch: int) -> np.ndarray:
        of_epoch = getattr(self.rows, "lengths_of", None)
        return self.rows.lengths if of_epoch is None else of_epoch(epoch)

    def _picture_tokens(self, epoch: int) -> np.ndarray | None:
        """Tokens of pictures in each row, int64 `[n]`; None if none can have one."""
        of_epoch = getattr(self.rows, "picture_tokens_of", None)
        return getattr(self.rows, "picture_tokens", None) if of_epoch is None else of_epoch(epoch)

    def _kinds(self, epoch: int) -> Kinds | None:
        """Which rows have which kind of picture, in an epoch; None if none can have one."""
        of_epoch = getattr(self.rows, "kinds_of", None)
        return getattr(self.rows, "kinds", None) if of_epoch is None else of_epoch(epoch)

    def _cut(self, order: np.ndarray, count: int) -> np.ndarray:
        """`order` as `count` global batches; the last one is filled up with -1."""
        size = self.global_batch_size
        batches = np.full(count * size, -1, dtype=np.int64)
        batches[: len(order)] = order[: len(batches)]
        return batches.reshape(-1, size)

    def state_dict(self) -> dict[str, Any]:
        """The position as numbers and strings. It is the same on every rank."""
        return {
            "epoch": self.epoch,
            "batches_yielded": self.batches_yielded,
            "rows_done": self.rows_done,
            "seed": self._order[0],
            "order_size": self._order[1],
            "global_batch_size": self.global_batch_size,
            "fingerprint": self.rows.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that was yielded when the state was saved, on any number of ranks.

        The batch size, the seed, `drop_last` and the limit may be others than those of the state.

        Raises:
            ValueError: the data or its tokenization changed.
        """
        if state["fingerprint"] != self.rows.fingerprint:
            raise ValueError(other_data_message())
        saved_size, batches = int(state["global_batch_size"]), int(state["batches_yielded"])
        done = int(state.get("rows_done", min(len(self.rows), batches * saved_size)))
        left = self._left(done)
        # Computed with the saved batch size too: what that left out of its epoch is not handed out now.
        finished = left <= 0 or (self.drop_last and len(self.rows) - done < saved_size)
        self.epoch = int(state["epoch"]) + (1 if finished else 0)
        self._begin_epoch()
        self.batches_yielded = 0
        if not finished:
            self._order = (int(state["seed"]), int(state.get("order_size", saved_size)))
            self.batches_yielded = self.end - left
            self._begun = (self.batches_yielded, done)
        self._resumed = True

    def _left(self, done: int) -> int:
        """Global batches that are left of an epoch after `done` rows."""
        if self._limit is not None and self._limit < len(self):
            return -(-(self._limit * self.global_batch_size - done) // self.global_batch_size)
        full, rest = divmod(len(self.rows) - done, self.global_batch_size)
        return full + (1 if rest and not self.drop_last else 0)


def other_data_message(changed: str = "") -> str:
    """What to tell a user whose data is not the checkpoint's.

    Args:
        changed: the settings that are known to have changed.
    """
    known = f" Changed: {changed}." if changed else ""
    return (
        "the data changed since the checkpoint was written: the rows, the tokenizer, its chat template, or a setting "
        "that determines the rows (seq_len, packing, loss_on, val_split, ...) is different. The position in the epoch "
        f"is therefore not valid.{known} Restore them; or keep the optimizer and begin with this data "
        "(fit(resume='data'), --resume data); or start a new run from the checkpoint's weights (resume='weights')."
    )


class _Ranks(NamedTuple):
    """One of several data-parallel ranks, and the rows of its micro-batches."""

    rank: int
    size: int
    rows: int
    always: bool

    def of(self, batch: np.ndarray) -> np.ndarray:
        """This rank's rows of a global batch."""
        return batch[self.rank :: self.size]

    def lacking(self, batch: np.ndarray, kinds: Kinds | None) -> Lacking:
        """What this rank's micro-batches of a global batch lack."""
        if kinds is None or self.size == 1:
            return Lacking()
        found = {kind: self._found(np.where(batch >= 0, rows[batch], False)) for kind, rows in kinds.items()}
        wanted = {kind: here.any(0) for kind, here in found.items()}
        nothing = ~np.any(list(wanted.values()), axis=0)  # [micro-batches]
        if self.always:
            wanted["picture"] = wanted["picture"] | nothing
        lacks = {kind: wanted[kind] & ~here[self.rank] for kind, here in found.items()}
        here = [[kind for kind, missing in lacks.items() if missing[place]] for place in range(len(nothing))]
        return Lacking(here, bool(self.always and nothing.all()))

    def _found(self, has: np.ndarray) -> np.ndarray:
        """Which micro-batch of which rank has what these rows of a global batch have: `[ranks, micro-batches]`."""
        by_rank = np.stack([has[rank :: self.size] for rank in range(self.size)])  # [ranks, rows]
        found: np.ndarray = np.any(by_rank.reshape(self.size, -1, self.rows), axis=-1)
        return found


def _shares(
    batches: np.ndarray,
    lengths: np.ndarray,
    kinds: Kinds | None,
    width: int,
    offset: int,
    packed: bool,
    ranks: _Ranks,
) -> Iterator[Step]:
    for batch in batches:
        wide = width if packed else padded_width(int(lengths[batch[batch >= 0]].max()), width)
        own = ranks.of(np.where(batch >= 0, batch + offset, -1)).tolist()
        yield own, wide, ranks.lacking(batch, kinds)


def even_out(batches: np.ndarray, picture_tokens: np.ndarray | None) -> np.ndarray:
    """Order the rows of each global batch by their tokens of pictures, most first and fillers last.

    Ranks take the rows in turns and wait for each other after each micro-batch, in which they have neighbours of this
    order. It does not depend on the number of ranks.

    Args:
        batches: row numbers, −1 for a filler: int64 `[n, global_batch_size]`.
        picture_tokens: of each row; None leaves the order as it is.
    """
    if picture_tokens is None:
        return batches
    tokens = np.where(batches >= 0, picture_tokens[batches], -1)
    return np.take_along_axis(batches, np.argsort(-tokens, axis=1, kind="stable"), axis=1)


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

    def __init__(self, rows: Rows, micro_batch_size: int, pad_id: int, collate: Collate) -> None:
        self.rows, self.micro_batch_size, self.pad_id, self.collate = rows, micro_batch_size, pad_id, collate

    def __getitem__(self, step: Step) -> list[MicroBatch]:
        rows, width, lacking = step
        documents = self.rows.fetch(rows)
        batches = micro_batches(documents, self.micro_batch_size, width, self.pad_id, self.collate, lacking)
        if isinstance(self.rows, MixtureRows):
            add_sources(batches, self.rows.sources_of(rows), self.micro_batch_size)
        return batches


class _Undealt(Dataset):
    """Hands global batches through: their rows are fetched when they are dealt."""

    def __getitem__(self, batch: GlobalBatch) -> GlobalBatch:
        return batch


def add_sources(batches: Sequence[MicroBatch], sources: np.ndarray, size: int) -> None:
    """Write down the source of each row of a mixture.

    Args:
        batches: the micro-batches.
        sources: the source of each row of all of them, int64 `[rows]`.
        size: rows per micro-batch.
    """
    for batch, part in zip(batches, torch.from_numpy(sources).split(size)):
        added = len(batch["input_ids"]) - len(part)  # a row for a blank picture, which trains nothing
        batch["sources"] = torch.cat([part, part[-1:].expand(added)])


def micro_batches(
    rows: list,
    size: int,
    width: int,
    pad_id: int,
    collate: Collate = collate_packed,
    lacking: Lacking = Lacking(),  # noqa: B008
) -> list[MicroBatch]:
    """Split rows into micro-batches.

    Args:
        rows: the documents of each row.
        size: rows per micro-batch.
        width: tokens per row.
        pad_id: token id for padding.
        collate: `collate_packed`, `collate_padded`, or one that knows pictures.
        lacking: which micro-batches must have pictures or videos that their rows have not.
    """
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    if not lacking.here:
        return [collate(part, width, pad_id) for part in parts]
    made = [collate(part, width, pad_id, lacks=kinds) for part, kinds in zip(parts, lacking.here)]
    return [{**part, "only_blank_pictures": True} for part in made] if lacking.everywhere else made
