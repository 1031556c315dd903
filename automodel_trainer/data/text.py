"""TextDataModule: pre-training on raw text, read whole or streamed."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from automodel_trainer.data.base import MicroBatchDataModule, TrainLoader
from automodel_trainer.data.documents import document_end, encode_documents
from automodel_trainer.data.rows import Rows, StreamRows, TokenStore, digest
from automodel_trainer.data.sources import load_rows, load_validation_rows, open_stream
from automodel_trainer.data.stream import StreamLoader, TokenStream
from automodel_trainer.data.tokens import check_columns, check_share, split_ids, tokenize

PIECE = 4096
"""Documents are stored in pieces of that many tokens, so that a row out of a whole book is read without the book."""


class TextDataModule(MicroBatchDataModule):
    """Raw text for pre-training: documents, each ended by EOS, laid end to end and cut into rows of `seq_len`.

    No document sees another: positions restart at each. Every token is trained but the first of a document (of its
    part in a row).

    With `streaming=True` the text is read and tokenised while training and never held whole. Every rank reads the whole
    stream and takes its rows of each global batch, so that the batches are the same on any number of ranks, and the
    saved position is exact, to the token, even on another number of ranks. The shuffle is one of blocks of
    `shuffle_buffer` documents; `Trainer(max_steps=...)` says when to stop. Where a rank tokenises slower than all ranks
    together train, tokenise beforehand (`streaming=False`).

    Args:
        train: a txt, jsonl, json or parquet file or a folder of them (a txt file is one document), a folder written by
            `save_to_disk`, a hub id, a `datasets.Dataset` or `DatasetDict`, a list of dicts; where streaming, also a
            `datasets.IterableDataset`.
        validation: the same, for validation; always read whole. None: the validation split that comes with `train`
            (where not streaming), if any.
        tokenizer: a tokenizer or the path of one. None: the model's, set by the Trainer.
        seq_len: tokens of a row.
        micro_batch_size: rows of one forward pass on one rank.
        global_batch_size: rows of one optimizer step over all ranks. None: one micro-batch on each data-parallel rank,
            times the Trainer's accumulation.
        text_column: the column that has the text.
        streaming: read and tokenise while training.
        val_split: the share of the documents of `train` kept for validation, where `validation` is None.
        seed: decides the order in each epoch, and which documents `val_split` takes.
        shuffle_buffer: documents of a stream shuffled among each other; 0 or 1 for the order of the stream.
        test: data for `Trainer.test`.
        num_workers: processes that build micro-batches ahead of the training; at most 1 where streaming.
        drop_last: leave the last global batch of an epoch out where it runs short, rather than fill it.
        cache: keep the tokens on disk and read them from there the next time.

    Raises:
        ValueError: the data cannot be trained on (no rows, an unknown column, no text).
    """

    def __init__(
        self,
        train: str | Any,
        validation: str | Any | None = None,
        *,
        tokenizer: str | Any | None = None,
        seq_len: int = 2048,
        micro_batch_size: int = 1,
        global_batch_size: int | None = None,
        text_column: str = "text",
        streaming: bool = False,
        val_split: float = 0.0,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        test: str | Any | None = None,
        num_workers: int = 0,
        drop_last: bool = False,
        cache: bool = True,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            seed=seed,
            num_workers=num_workers,
            drop_last=drop_last,
        )
        check_share(val_split)
        if val_split and (validation is not None or streaming):
            reason = "a stream cannot be split: give validation data" if streaming else "validation is given too"
            raise ValueError(f"val_split={val_split} cannot be used here: {reason}.")
        if streaming and num_workers > 1:
            raise ValueError(f"num_workers={num_workers}: a stream is read by at most one worker.")
        self.train, self.validation, self.test = train, validation, test
        self.text_column = text_column
        self.streaming = streaming
        self.val_split = val_split
        self.shuffle_buffer = shuffle_buffer
        self.cache = cache
        self._stream: TokenStream | None = None

    def build_rows(self) -> dict[str, Rows]:
        rows: dict[str, Rows] = {}
        if self.streaming:
            self._stream = self._open_stream()
        else:
            rows.update(self._train_rows())
        if self.validation is not None:
            rows["validation"] = self._whole("validation", load_rows(self.validation, "validation"))
        if self.test is not None:
            rows["test"] = self._whole("test", load_rows(self.test, "test"))
        return rows

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; all steps there are (`max_steps`) where streaming.

        Raises:
            ValueError: a Trainer that streams has no `max_steps`.
        """
        if not self.streaming:
            return super().steps_per_epoch
        if self.trainer is None:
            return sys.maxsize
        if self.trainer.max_steps < 1:
            raise ValueError("a stream has no end: set Trainer(max_steps=...) with TextDataModule(streaming=True).")
        return self.trainer.max_steps

    def build_train_loader(self) -> TrainLoader:
        if not self.streaming:
            return super().build_train_loader()
        assert self._stream is not None, "prepare() opens the stream"
        layout = self._layout()
        layout.pop("packed")  # a stream always is
        return StreamLoader(
            self._stream,
            steps=self.steps_per_epoch,
            global_batch_size=self.rows_per_step,
            num_workers=self.num_workers,
            **layout,
        )

    def summary(self) -> str:
        streamed = f"train: streamed in rows of {self.seq_len} tokens" if self.streaming else ""
        return "\n".join(line for line in (streamed, super().summary()) if line)

    def _train_rows(self) -> dict[str, Rows]:
        train = load_rows(self.train, "train")
        if not self.val_split:
            rows = {"train": self._whole("train", train)}
            found = load_validation_rows(self.train) if self.validation is None else None
            return rows if found is None else {**rows, "validation": self._whole("validation", found)}
        store, key = self._pieces(train)
        held_out = np.isin(store.sample_ids, split_ids(len(train), self.val_split, self.seed))
        key = digest(key, self.val_split, self.seed)
        return {
            "train": self._rows("train", store, np.flatnonzero(~held_out), key),
            "validation": self._rows("validation", store, np.flatnonzero(held_out), key),
        }

    def _whole(self, split: str, rows: Dataset) -> Rows:
        store, key = self._pieces(rows)
        return self._rows(split, store, np.arange(len(store)), key)

    def _rows(self, split: str, store: TokenStore, pieces: np.ndarray, key: str) -> Rows:
        if len(pieces) == 0:
            raise ValueError(f"{split}: no row has any text in column {self.text_column!r}.")
        return StreamRows(store, pieces, self.seq_len, digest(key, split, self.seq_len))

    def _pieces(self, rows: Dataset) -> tuple[TokenStore, str]:
        check_columns([self.text_column], rows.column_names)
        tokenizer, column = self.load_tokenizer(), self.text_column
        document_end(tokenizer)

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            pieces: dict[str, list[Any]] = {"input_ids": [], "sample_id": []}
            for index, ids in zip(indices, encode_documents(tokenizer, batch[column])):
                for start in range(0, len(ids), PIECE):
                    pieces["input_ids"].append(ids[start : start + PIECE])
                    pieces["sample_id"].append(index)
            return pieces

        settings = {"kind": "text", "text_column": column}
        samples, key = tokenize(rows, encode, tokenizer=tokenizer, settings=settings, masked=False, cache=self.cache)
        return TokenStore(samples), key

    def _open_stream(self) -> TokenStream:
        rank_zero_info("streaming: every rank reads the whole stream and takes its rows of each global batch")
        return TokenStream(
            open_stream(self.train),
            self.load_tokenizer(),
            seq_len=self.seq_len,
            text_column=self.text_column,
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer,
        )
