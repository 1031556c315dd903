"""Rows, the lines of a micro-batch: samples packed or alone, a token stream cut evenly, random tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from datasets import Dataset

from automodel_trainer.data.batches import Document


@dataclass(frozen=True)
class RowStats:
    """What became of the samples of one split.

    Attributes:
        samples: samples in the rows.
        rows: number of rows.
        tokens: tokens in the rows, padding not counted.
        supervised: tokens that are trained.
        capacity: tokens the rows could hold.
        overlong: samples longer than a row, and what was done with them in `overlong_action`.
        unsupervised: samples left out because no token of theirs is trained.
    """

    samples: int
    rows: int
    tokens: int
    supervised: int
    capacity: int
    overlong: int = 0
    overlong_action: str = ""
    unsupervised: int = 0

    def describe(self) -> str:
        text = (
            f"{self.samples:,} samples in {self.rows:,} rows, {self.tokens:,} tokens "
            f"({self.tokens / self.capacity:.1%} of the rows filled), {self.supervised / self.tokens:.1%} supervised"
        )
        if self.overlong:
            text += f"; {self.overlong:,} samples longer than seq_len {self.overlong_action}"
        if self.unsupervised:
            text += f"; {self.unsupervised:,} samples without a supervised token left out"
        return text


class Rows(Protocol):
    """A finite set of rows, the same on every rank.

    Attributes:
        width: the most tokens a row has.
        lengths: tokens of each row, `[len(self)]`.
        fingerprint: a hash that changes with the content or the making of the rows.
        stats: what became of the samples.
    """

    width: int
    lengths: np.ndarray
    fingerprint: str
    stats: RowStats

    def __len__(self) -> int: ...

    def fetch(self, rows: Sequence[int]) -> list[list[Document]]:
        """The documents of some rows; row -1 is the filler, which has none."""
        ...


class TokenStore:
    """Random access to tokenised samples that lie on disk.

    Args:
        dataset: columns `input_ids` (list of int), `length` and `sample_id` (int) and, where not all tokens are
            trained, `trained` (list of bool) and `supervised` (int).

    Attributes:
        lengths: tokens of each sample.
        sample_ids: the row each sample comes from.
        supervised: trained tokens of each sample, its first token not counted.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.lengths = _integers(dataset, "length")
        self.sample_ids = _integers(dataset, "sample_id")
        columns = [name for name in ("input_ids", "trained") if name in dataset.column_names]
        self._all_trained = "trained" not in columns
        self.supervised = self.lengths - 1 if self._all_trained else _integers(dataset, "supervised")
        # Arrow tables, not Python lists: a batch is thousands of tokens, and each would become an object.
        self._rows = dataset.select_columns(columns).with_format("arrow")

    def __len__(self) -> int:
        return len(self.lengths)

    def fetch(self, indices: Sequence[int]) -> list[Document]:
        """The documents with these indices, in that order."""
        if len(indices) == 0:
            return []
        table = self._rows[list(indices)]
        ids = table["input_ids"].combine_chunks()
        bounds = ids.offsets.to_numpy() - ids.offsets[0].as_py()
        tokens = ids.flatten().to_numpy()
        if self._all_trained:
            trained = np.ones(len(tokens), dtype=bool)
        else:
            mask = table["trained"].combine_chunks()
            trained = mask.flatten().to_numpy(zero_copy_only=False)
            assert len(trained) == len(tokens), "a mask is as long as its tokens"
        return [
            Document(tokens[start:end], trained[start:end], int(self.sample_ids[index]))
            for index, start, end in zip(indices, bounds[:-1], bounds[1:])
        ]

    def count_supervised(self, indices: np.ndarray, limit: int) -> np.ndarray:
        """Trained tokens of each sample within its first `limit` tokens, the first token never counted."""
        counts = self.supervised[indices]
        cut = np.flatnonzero(self.lengths[indices] > limit)
        for start in range(0, len(cut), 1000):
            part = cut[start : start + 1000]
            counts[part] = [int(d.trained[1:limit].sum()) for d in self.fetch(indices[part].tolist())]
        return counts


class SampleRows:
    """Rows that hold whole samples.

    Args:
        store: the tokenised samples.
        groups: for each row the indices of its samples in the store.
        width: tokens of a row; a longer sample, alone in its row, is cut there.
    """

    def __init__(
        self, store: TokenStore, groups: Iterable[np.ndarray], width: int, stats: RowStats, fingerprint: str
    ) -> None:
        self.store, self.width, self.stats, self.fingerprint = store, width, stats, fingerprint
        groups = list(groups)
        self._members = np.concatenate(groups)
        self._bounds = np.cumsum([0, *map(len, groups)])
        lengths = np.minimum(store.lengths[self._members], width)
        self.lengths = np.add.reduceat(lengths, self._bounds[:-1])

    def __len__(self) -> int:
        return len(self.lengths)

    def fetch(self, rows: Sequence[int]) -> list[list[Document]]:
        members = [[] if row < 0 else self._members[self._bounds[row] : self._bounds[row + 1]].tolist() for row in rows]
        documents = iter(self.store.fetch([index for group in members for index in group]))
        return [[_cut(next(documents), 0, self.width) for _ in group] for group in members]


class StreamRows:
    """Rows cut evenly from all documents laid end to end; the last row is shorter.

    A document that goes on in the next row starts anew there: its positions restart and its first token is not trained.

    Args:
        store: pieces of documents, in order; neighbours with the same sample id belong to the same document.
        pieces: the indices of the pieces to use, ascending.
        width: tokens of a row.
    """

    def __init__(self, store: TokenStore, pieces: np.ndarray, width: int, fingerprint: str) -> None:
        self.store, self.width, self.fingerprint = store, width, fingerprint
        self._pieces = pieces
        self._ends = np.cumsum(store.lengths[pieces])
        total = int(self._ends[-1])
        count = -(-total // width)
        self.lengths = np.full(count, width, dtype=np.int64)
        self.lengths[-1] = total - (count - 1) * width
        starts = np.flatnonzero(np.diff(store.sample_ids[pieces], prepend=-1))
        begins = np.concatenate([[0], self._ends[:-1]])[starts]
        untrained = len(np.union1d(begins, np.arange(count) * width))  # the first token of every document and row
        self.stats = RowStats(len(starts), count, total, total - untrained, count * width)

    def __len__(self) -> int:
        return len(self.lengths)

    def fetch(self, rows: Sequence[int]) -> list[list[Document]]:
        return [[] if row < 0 else self._fetch_row(row) for row in rows]

    def _fetch_row(self, row: int) -> list[Document]:
        start, end = row * self.width, row * self.width + int(self.lengths[row])
        first, last = np.searchsorted(self._ends, [start, end - 1], side="right")
        pieces = self.store.fetch(self._pieces[first : last + 1].tolist())
        offset = int(self._ends[first]) - len(pieces[0].input_ids)
        documents: list[Document] = []
        for piece in pieces:
            part = _cut(piece, max(0, start - offset), min(len(piece.input_ids), end - offset))
            offset += len(piece.input_ids)
            if documents and documents[-1].sample_id == part.sample_id:
                part = _join(documents.pop(), part)
            documents.append(part)
        return documents


class RandomRows:
    """Rows of random tokens, row `i` a function of (seed, i): the same on every layout.

    Args:
        count: number of rows.
        width: tokens of a row.
        vocab_size: tokens are drawn from 1 to `vocab_size - 1`.
        seed: decides the tokens.
    """

    def __init__(self, count: int, width: int, vocab_size: int, seed: int) -> None:
        self.width, self.vocab_size, self.seed = width, vocab_size, seed
        self.lengths = np.full(count, width, dtype=np.int64)
        self.fingerprint = digest("random", count, width, vocab_size, seed)
        self.stats = RowStats(count, count, count * width, count * (width - 1), count * width)

    def __len__(self) -> int:
        return len(self.lengths)

    def fetch(self, rows: Sequence[int]) -> list[list[Document]]:
        return [[] if row < 0 else [self._document(row)] for row in rows]

    def _document(self, row: int) -> Document:
        generator = np.random.default_rng([self.seed, row])
        return Document(generator.integers(1, self.vocab_size, self.width), np.ones(self.width, dtype=bool), row)


def digest(*parts: object) -> str:
    """A short hash of the parts, by their `repr`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _cut(document: Document, start: int, end: int) -> Document:
    return Document(document.input_ids[start:end], document.trained[start:end], document.sample_id)


def _join(left: Document, right: Document) -> Document:
    ids = np.concatenate([left.input_ids, right.input_ids])
    return Document(ids, np.concatenate([left.trained, right.trained]), left.sample_id)


def _integers(dataset: Dataset, column: str) -> np.ndarray:
    return dataset.select_columns([column]).with_format("arrow")[:][column].to_numpy().astype(np.int64)
