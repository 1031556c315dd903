"""The rows that micro-batches are made of: packed or single samples, an evenly cut token stream, or random tokens."""

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
    """Statistics of one split.

    Attributes:
        samples: number of samples in the rows.
        rows: number of rows.
        tokens: number of tokens, without padding.
        supervised: number of trained tokens.
        capacity: number of tokens that fit into the rows.
        overlong: number of samples longer than a row.
        overlong_action: what was done with them: "dropped" or "truncated".
        unsupervised: number of samples left out because none of their tokens is trained.
        empty: number of rows of the data left out because they have no text.
        unknown: share of the tokens that are the tokenizer's unknown token, in the whole source.
    """

    samples: int
    rows: int
    tokens: int
    supervised: int
    capacity: int
    overlong: int = 0
    overlong_action: str = ""
    unsupervised: int = 0
    empty: int = 0
    unknown: float = 0.0

    def describe(self) -> str:
        """The statistics in one line of text."""
        text = (
            f"{self.samples:,} samples in {self.rows:,} rows, {self.tokens:,} tokens "
            f"({self.tokens / self.capacity:.1%} of the rows filled), {self.supervised / self.tokens:.1%} supervised"
        )
        if self.overlong:
            text += f"; {self.overlong:,} samples longer than seq_len {self.overlong_action}"
        if self.unsupervised:
            text += f"; {self.unsupervised:,} samples without a supervised token left out"
        if self.empty:
            text += f"; {self.empty:,} rows without text left out"
        if self.unknown:
            text += f"; {self.unknown:.2%} unknown tokens"
        return text


class Rows(Protocol):
    """A finite set of rows, the same on every rank.

    Attributes:
        width: maximum number of tokens per row.
        lengths: tokens per row, int64 `[len(self)]`.
        fingerprint: a hash of the content of the rows and of the settings that determine them.
        stats: statistics of the split.
        longest: tokens of the longest document.
    """

    width: int
    lengths: np.ndarray
    fingerprint: str
    stats: RowStats
    longest: int

    def __len__(self) -> int: ...

    def fetch(self, rows: Sequence[int]) -> list[list[Document]]:
        """The documents of the given rows; row -1 is the filler, which has none."""
        ...

    def highest(self) -> tuple[int, int]:
        """The highest token id in the data, and a sample that has it."""
        ...


_COMPARED = 100  # samples
_SCANNED = 10_000  # samples at a time
_LOOKED_INTO = 100  # times as many, for a share


class TokenStore:
    """Random access to tokenized samples on disk.

    Args:
        dataset: has the columns `input_ids` (list of int), `length` and `sample_id` (int) and, unless all tokens are
            trained, `trained` (list of bool) and `supervised` (int).

    Attributes:
        lengths: tokens per sample, int64 `[n]`.
        sample_ids: the row that each sample comes from, int64 `[n]`.
        supervised: trained tokens per sample, without its first token, int64 `[n]`.
        empty_turns: assistant turns per sample that have no content and no calls, int64 `[n]`.
        unknown: share of the tokens that are the tokenizer's unknown token, once somebody has looked.
    """

    unknown = 0.0

    def __init__(self, dataset: Dataset) -> None:
        self.lengths = integers(dataset, "length")
        self.sample_ids = integers(dataset, "sample_id")
        columns = [name for name in ("input_ids", "trained") if name in dataset.column_names]
        self._all_trained = "trained" not in columns
        self.supervised = self.lengths - 1 if self._all_trained else integers(dataset, "supervised")
        self.empty_turns = (
            integers(dataset, "empty_turns")
            if "empty_turns" in dataset.column_names
            else np.zeros(len(dataset), np.int64)
        )
        # Arrow tables instead of Python lists: a batch has thousands of tokens, and each would become an object.
        self._rows = dataset.select_columns(columns).with_format("arrow")

    def __len__(self) -> int:
        return len(self.lengths)

    def fetch(self, indices: Sequence[int]) -> list[Document]:
        """The documents with these indices, in this order."""
        if len(indices) == 0:
            return []
        table = self._rows[list(indices)]
        ids = table["input_ids"].combine_chunks()
        bounds = ids.offsets.to_numpy() - ids.offsets[0].as_py()  # the array may be a slice of a longer one
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

    def looks_like(self, other: TokenStore) -> bool:
        """Whether the samples have the lengths of another store's, and the first ones their tokens."""
        if not np.array_equal(self.lengths, other.lengths):
            return False
        first = range(min(len(self), _COMPARED))
        pairs = zip(self.fetch(first), other.fetch(first))
        return all(np.array_equal(one.input_ids, two.input_ids) for one, two in pairs)

    def highest(self) -> tuple[int, int]:
        """The highest token id, and the `sample_id` of a sample that has it."""
        found, at = -1, 0
        for start in range(0, len(self), _SCANNED):
            ids = self._rows[start : start + _SCANNED]["input_ids"].combine_chunks()
            tokens = ids.flatten().to_numpy()
            if len(tokens) and tokens.max() > found:
                place = int(tokens.argmax()) + ids.offsets[0].as_py()
                sample = int(np.searchsorted(ids.offsets.to_numpy(), place, side="right")) - 1
                found, at = int(tokens.max()), int(self.sample_ids[start + sample])
        return found, at

    def share_of(self, token: int) -> tuple[float, int]:
        """The share of a token in the samples, and the sample that has most of it. Of many, samples are looked at."""
        count = total = most = worst = 0
        starts = range(0, len(self), _SCANNED)
        for start in starts[:: -(-len(starts) // _LOOKED_INTO)]:
            ids = self._rows[start : start + _SCANNED]["input_ids"].combine_chunks()
            found = ids.flatten().to_numpy() == token
            total, here = total + len(found), int(found.sum())
            count += here
            if here:
                ends = np.concatenate([[0], np.cumsum(found)])[ids.offsets.to_numpy() - ids.offsets[0].as_py()]
                of_samples = np.diff(ends)
                if of_samples.max() > most:
                    most, worst = int(of_samples.max()), start + int(of_samples.argmax())
        return count / max(1, total), worst

    def count_supervised(self, indices: np.ndarray, limit: int) -> np.ndarray:
        """Count the trained tokens within the first `limit` tokens of each sample, without its first token.

        Args:
            indices: int array `[n]`.
            limit: tokens per row; the rest of a sample is cut off.

        Returns:
            int64 `[n]`.
        """
        counts = self.supervised[indices]
        cut = np.flatnonzero(self.lengths[indices] > limit)
        for start in range(0, len(cut), 1000):
            part = cut[start : start + 1000]
            counts[part] = [int(d.trained[1:limit].sum()) for d in self.fetch(indices[part].tolist())]
        return counts


class SampleRows:
    """Rows of whole samples.

    Args:
        store: the tokenized samples.
        groups: for each row, the indices of its samples in the store.
        width: tokens per row. A longer sample must be alone in its row; it is cut off.
        stats: statistics of the split.
        fingerprint: hash of the content and the settings.
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
        self.longest = int(lengths.max())

    def __len__(self) -> int:
        return len(self.lengths)

    def highest(self) -> tuple[int, int]:
        """The highest token id of the store, and a sample that has it."""
        return self.store.highest()

    def fetch(self, rows: Sequence[int]) -> list[list[Document]]:
        """The documents of the given rows; row -1 is the filler, which has none."""
        members = [[] if row < 0 else self._members[self._bounds[row] : self._bounds[row + 1]].tolist() for row in rows]
        documents = iter(self.store.fetch([index for group in members for index in group]))
        return [[_cut(next(documents), 0, self.width) for _ in group] for group in members]


class StreamRows:
    """Rows cut from documents that are laid end to end: evenly, or each document by itself.

    Cut evenly, only the last row may be shorter. Otherwise the last row of each document may be, and a row of one token
    is left out: it has nothing to predict. If a document continues in the next row, it starts anew there: positions
    restart, and its first token is not trained.

    Args:
        store: pieces of documents, in order. Neighbors with the same sample id belong to the same document.
        pieces: indices of the pieces to use, ascending, int64 `[n]`.
        width: tokens per row.
        fingerprint: hash of the content and the settings.
        packed: False: no row holds tokens of two documents.
    """

    def __init__(
        self, store: TokenStore, pieces: np.ndarray, width: int, fingerprint: str, packed: bool = True
    ) -> None:
        self.store, self.width, self.fingerprint = store, width, fingerprint
        self._pieces = pieces
        self._ends = np.cumsum(store.lengths[pieces])
        starts = np.flatnonzero(np.diff(store.sample_ids[pieces], prepend=-1))  # the first piece of each document
        self.longest = min(width, int(np.add.reduceat(store.lengths[pieces], starts).max()))
        begins = np.concatenate([[0], self._ends[:-1]])[starts]
        total = int(self._ends[-1])
        if packed:
            self._starts = np.arange(0, total, width, dtype=np.int64)
            self.lengths = np.minimum(width, total - self._starts)
            first_tokens = np.union1d(begins, self._starts)  # of every document and row: not trained
        else:
            ends = np.append(begins[1:], total)
            self._starts = np.concatenate([np.arange(b, e, width, dtype=np.int64) for b, e in zip(begins, ends)])
            after = ends[np.searchsorted(ends, self._starts, side="right")]  # where the row's document ends
            self.lengths = np.minimum(width, after - self._starts)
            self._starts, self.lengths = (a[self.lengths > 1] for a in (self._starts, self.lengths))
            first_tokens = self._starts
        tokens, count = int(self.lengths.sum()), len(self.lengths)
        capacity = count * width if packed else tokens  # the width of padded rows varies
        self.stats = RowStats(len(starts), count, tokens, tokens - len(first_tokens), capacity)

    def __len__(self) -> int:
        return len(self.lengths)

    def highest(self) -> tuple[int, int]:
        """The highest token id of the store, and a sample that has it."""
        return self.store.highest()

    def fetch(self, rows: Sequence[int]) -> list[list[Document]]:
        """The documents of the given rows; row -1 is the filler, which has none."""
        return [[] if row < 0 else self._fetch_row(row) for row in rows]

    def _fetch_row(self, row: int) -> list[Document]:
        start = int(self._starts[row])
        end = start + int(self.lengths[row])
        first, last = np.searchsorted(self._ends, [start, end - 1], side="right")
        pieces = self.store.fetch(self._pieces[first : last + 1].tolist())
        offset = int(self._ends[first]) - len(pieces[0].input_ids)
        documents: list[Document] = []
        for piece in pieces:
            part = _cut(piece, max(0, start - offset), min(len(piece.input_ids), end - offset))
            offset += len(piece.input_ids)
            if documents and documents[-1].sample_id == part.sample_id:  # another piece of the same document
                part = _join(documents.pop(), part)
            documents.append(part)
        return documents


class RandomRows:
    """Rows of random tokens. Row `i` depends only on the seed and `i`, so rows are the same on every layout.

    Args:
        count: number of rows.
        width: tokens per row.
        vocab_size: tokens are drawn from 1 to `vocab_size - 1`.
        seed: determines the tokens.
    """

    def __init__(self, count: int, width: int, vocab_size: int, seed: int) -> None:
        self.width, self.vocab_size, self.seed = width, vocab_size, seed
        self.lengths = np.full(count, width, dtype=np.int64)
        self.fingerprint = digest("random", count, width, vocab_size, seed)
        self.stats = RowStats(count, count, count * width, count * (width - 1), count * width)
        self.longest = width

    def __len__(self) -> int:
        return len(self.lengths)

    def highest(self) -> tuple[int, int]:
        """The highest token id that may be drawn."""
        return self.vocab_size - 1, 0

    def fetch(self, rows: Sequence[int]) -> list[list[Document]]:
        """The documents of the given rows; row -1 is the filler, which has none."""
        return [[] if row < 0 else [self._document(row)] for row in rows]

    def _document(self, row: int) -> Document:
        generator = np.random.default_rng([self.seed, row])
        return Document(generator.integers(1, self.vocab_size, self.width), np.ones(self.width, dtype=bool), row)


def digest(*parts: object) -> str:
    """A short hash of the `repr` of the parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _cut(document: Document, start: int, end: int) -> Document:
    if start == 0 and len(document.input_ids) <= end:
        return document
    return Document(document.input_ids[start:end], document.trained[start:end], document.sample_id)


def _join(left: Document, right: Document) -> Document:
    ids = np.concatenate([left.input_ids, right.input_ids])
    return Document(ids, np.concatenate([left.trained, right.trained]), left.sample_id)


def integers(dataset: Dataset, column: str) -> np.ndarray:
    """A column of whole numbers: int64 `[n]`."""
    return dataset.select_columns([column]).with_format("arrow")[:][column].to_numpy().astype(np.int64)
