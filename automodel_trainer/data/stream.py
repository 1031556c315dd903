"""Streamed text: rows of tokens from an `IterableDataset`, with a position that can be saved and restored."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
from datasets import IterableDataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import IterableDataset as TorchIterableDataset

from automodel_trainer.data.batches import Document, MicroBatch
from automodel_trainer.data.cache import cache_key
from automodel_trainer.data.documents import check_text, document_end, encode_documents
from automodel_trainer.data.files import DataFile
from automodel_trainer.data.loader import add_sources, micro_batches
from automodel_trainer.data.sources import PlacedRow, files_of_stream
from automodel_trainer.data.step_loader import step_loader
from automodel_trainer.data.stream_files import check_marks, marks_of
from automodel_trainer.data.unknown_tokens import UnknownInStream
from automodel_trainer.data.worker_errors import items_of

DOCUMENTS_AT_ONCE = 64
"""Number of documents to tokenize in one call: the tokenizer spreads them over several cores."""

Position = dict[str, Any]
"""A place in the stream, as numbers and strings; see `TokenStream`."""
StreamRow = tuple[list[Document], Position, int]
"""The documents of a row, the position after it, and the number of its source, which is 0 but in mixtures."""


class RowStream(Protocol):
    """An endless sequence of rows, the same on every rank: a `TokenStream` or a `MixedStream` of several.

    Attributes:
        seq_len: tokens per row.
        fingerprint: a hash of the settings that determine the rows.
        names: of the sources of a mixture; empty for a single stream.
        files: those that are read, in order.
        tokenizer: makes the tokens.
    """

    tokenizer: Any
    seq_len: int
    fingerprint: str
    names: tuple[str, ...]
    files: list[DataFile]

    def beginning(self) -> Position:
        """The position of the first row."""
        ...

    def rows(self, position: Position) -> Iterator[StreamRow]:
        """Yield the rows from a position on."""
        ...

    def news(self, before: Position, after: Position) -> list[str]:
        """What a user is told between two positions."""
        ...


class TokenStream:
    """An endless sequence of rows of `seq_len` tokens: documents laid end to end, epoch after epoch.

    The stream is read in blocks of `shuffle_buffer` documents. Each block is shuffled by (seed, epoch, block). A
    position holds the state of the source at the start of a block, the document within the shuffled block, and the
    token within the document. The next row follows exactly from it. (We do not use the shuffle of `datasets`, because
    it loses its buffer when it resumes from a state.)

    Args:
        source: the rows of text.
        tokenizer: a tokenizer with an EOS token.
        seq_len: tokens per row.
        text_column: the column with the text.
        seed: determines the shuffle.
        shuffle_buffer: documents per block; 0 or 1: no shuffle.

    Raises:
        ValueError: the tokenizer has no EOS token, or the stream has no rows or no such column.
    """

    def __init__(
        self, source: IterableDataset, tokenizer: Any, *, seq_len: int, text_column: str, seed: int, shuffle_buffer: int
    ) -> None:
        document_end(tokenizer)
        self.source, self.tokenizer = source, tokenizer
        self.files = files_of_stream(source)
        self.names: tuple[str, ...] = ()
        self.seq_len, self.text_column = seq_len, text_column
        self.seed, self.block_size = seed, max(1, shuffle_buffer)
        settings = {"kind": "stream", "seq_len": seq_len, "column": text_column, "seed": seed, "block": self.block_size}
        self.fingerprint = cache_key("", tokenizer, settings)
        self._beginning = copy.deepcopy(source.state_dict())
        first = next(iter(source), None)
        if first is None:
            raise ValueError("the stream has no rows. Give a stream with at least one row.")
        if text_column not in first:
            raise ValueError(f"the stream has no column {text_column!r}; its columns are {sorted(first)}.")

    def beginning(self) -> Position:
        """The position of the first row."""
        place = {"epoch": 0, "block": 0, "read": 0, "source": copy.deepcopy(self._beginning), "document": 0, "token": 0}
        return {**place, "empty": 0, "empty_with_block": 0}

    def rows(self, position: Position) -> Iterator[StreamRow]:
        """Yield the rows from a position on, each with the position after it and its source, 0.

        Raises:
            ValueError: the stream has no text.
        """
        row: list[Document] = []
        room = self.seq_len
        for sample_id, ids, at in self._documents(position):
            start = at["token"]
            while start < len(ids):
                part = np.asarray(ids[start : start + room], dtype=np.int64)
                row.append(Document(part, np.ones(len(part), dtype=bool), sample_id))
                start, room = start + len(part), room - len(part)
                if room == 0:
                    yield row, {**at, "token": start}, 0
                    row, room = [], self.seq_len

    def _documents(self, position: Position) -> Iterator[tuple[int, list[int], Position]]:
        """Yield the documents from a position on: number in the epoch, tokens, and position of the start."""
        for block, order, at in self._blocks(position):
            for start in range(at["document"], len(order), DOCUMENTS_AT_ONCE):
                chosen = order[start : start + DOCUMENTS_AT_ONCE].tolist()
                encoded = encode_documents(self.tokenizer, [block[index] for index in chosen])
                for document, (index, ids) in enumerate(zip(chosen, encoded), start=start):
                    # Only the first document may be resumed in the middle.
                    token = at["token"] if document == at["document"] else 0
                    yield at["read"] + index, ids, {**at, "document": document, "token": token}

    def _blocks(self, position: Position) -> Iterator[tuple[list[str | None], np.ndarray, Position]]:
        """Yield the blocks of texts from a position on, each with the order of its texts and its position."""
        at = copy.deepcopy(position)
        while True:
            self.source.load_state_dict(copy.deepcopy(at["source"]))
            rows = iter(self.source)
            found_text = False
            while block := [self._text(row, at["read"] + i) for i, row in enumerate(islice(rows, self.block_size))]:
                found_text = found_text or any(block)
                behind = copy.deepcopy(self.source.state_dict())
                empty = at.get("empty", 0) + sum(not text for text in block)
                at = {**at, "empty_with_block": empty}
                yield block, self._order(len(block), at), at
                at = {**at, "block": at["block"] + 1, "read": at["read"] + len(block), "source": behind}
                at = {**at, "document": 0, "token": 0, "empty": empty}
            if not found_text:  # never true on resume: a saved position comes after some text
                raise ValueError(f"no row of the stream has any text in column {self.text_column!r}.")
            at = {**self.beginning(), "epoch": at["epoch"] + 1}

    def news(self, before: Position, after: Position) -> list[str]:
        """What a user is told between two positions: a new epoch, and the first rows of one that have no text."""
        begun = after["epoch"] > before["epoch"]
        lines = [f"the stream begins again: epoch {after['epoch'] + 1}"] if begun else []
        empty = after.get("empty_with_block", 0)
        if empty and (begun or not before.get("empty_with_block", 0)):
            lines.append(f"{empty:,} row(s) so far have no text in column {self.text_column!r}; such rows are left out")
        return lines

    def _text(self, row: dict[str, Any], number: int) -> str | None:
        place = f"row {number} of the stream" + (f" ({row.place})" if isinstance(row, PlacedRow) else "")
        if self.text_column not in row:
            raise ValueError(
                f"{place} has no column {self.text_column!r}; its columns are {sorted(row)}. Stream "
                "files that have the column, or set text_column."
            )
        return check_text(row[self.text_column], self.text_column, place)

    def _order(self, count: int, at: Position) -> np.ndarray:
        if self.block_size == 1:
            return np.arange(count)
        return np.random.default_rng([self.seed, at["epoch"], at["block"]]).permutation(count)


class StreamLoader:
    """The counterpart of `MicroBatchLoader` for a stream. Each `iter()` continues where the last one ended.

    Its length is the number of steps. It needs one, because Lightning prefetches a batch from loaders without a length
    and would then save a state that is one batch ahead.

    Args:
        stream: yields the rows, the same on every rank.
        steps: total number of batches.
        micro_batch_size: rows per micro-batch.
        global_batch_size: rows per global batch, a multiple of `micro_batch_size * dp_size`.
        dp_rank: this rank's index among the data-parallel ranks.
        dp_size: number of data-parallel ranks.
        pad_id: token id for padding (not used in practice, because rows are full).
        num_workers: 0, or 1 for a process that reads and tokenizes ahead of time.
    """

    def __init__(
        self,
        stream: RowStream,
        *,
        steps: int,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        pad_id: int = 0,
        num_workers: int = 0,
    ) -> None:
        assert global_batch_size % (micro_batch_size * dp_size) == 0, "checked by the data module"
        self.stream, self.total, self.num_workers = stream, steps, num_workers
        self.global_batch_size = global_batch_size
        self._share = (micro_batch_size, dp_rank, dp_size, pad_id)
        self.batches_yielded = 0
        self.position = stream.beginning()
        self._marks = marks_of(stream.files)
        self._unknown = UnknownInStream(stream.tokenizer)

    def __len__(self) -> int:
        return self.total

    has_one_width = True  # of all micro-batches

    def largest_steps(self) -> list[list[MicroBatch]]:
        """The first rows as the micro-batches of a step, at most two. All rows of a stream are full."""
        size, _, ranks, pad_id = self._share
        rows = [documents for documents, _, _ in islice(self.stream.rows(self.stream.beginning()), size)]
        count = 1 if self.global_batch_size == size * ranks else 2
        return [micro_batches(rows, size, self.stream.seq_len, pad_id) * count]

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        steps = _StreamSteps(self.stream, self.position, self.global_batch_size, *self._share)
        for batch, position in items_of(step_loader(steps, self.num_workers)):
            if self.batches_yielded >= self.total:
                return
            self.batches_yielded += 1
            self._unknown.look(batch)
            for line in self.stream.news(self.position, position):
                rank_zero_info(line)
            self.position = position
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position as numbers and strings. It is the same on every rank."""
        return {
            "batches_yielded": self.batches_yielded,
            "position": copy.deepcopy(self.position),
            "fingerprint": self.stream.fingerprint,
            "files": self._marks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that was yielded when the state was saved, on any number of ranks.

        Raises:
            ValueError: a setting that determines the rows changed, or a file did.
        """
        if state["fingerprint"] != self.stream.fingerprint:
            raise ValueError(
                "the tokenizer or a setting of the stream (seq_len, text_column, seed, shuffle_buffer, the sources and "
                "weights of a mixture) changed since the checkpoint was written, so its position in the stream is not "
                "valid. Restore them; or keep the optimizer and begin with this data (fit(resume='data'), --resume "
                "data); or start a new run from the checkpoint's weights (resume='weights')."
            )
        check_marks(state.get("files", []), self.stream.files)
        self.batches_yielded = int(state["batches_yielded"])
        self.position = copy.deepcopy(state["position"])


class _StreamSteps(TorchIterableDataset):
    """Yields this rank's share of each global batch, with the position after that batch."""

    def __init__(
        self,
        stream: RowStream,
        position: Position,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        pad_id: int,
    ) -> None:
        self.stream, self.position, self.global_batch_size = stream, position, global_batch_size
        self.micro_batch_size, self.dp_rank, self.dp_size, self.pad_id = micro_batch_size, dp_rank, dp_size, pad_id

    def __iter__(self) -> Iterator[tuple[list[MicroBatch], Position]]:
        stream = self.stream.rows(self.position)
        while batch := list(islice(stream, self.global_batch_size)):
            share = batch[self.dp_rank :: self.dp_size]
            rows = [documents for documents, _, _ in share]
            made = micro_batches(rows, self.micro_batch_size, self.stream.seq_len, self.pad_id)
            if self.stream.names:
                add_sources(made, np.array([source for _, _, source in share]), self.micro_batch_size)
            yield made, batch[-1][1]
