"""TextDataModule: pre-training on raw text, read whole or streamed."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from automodel_trainer.data.base import MicroBatchDataModule, TrainLoader
from automodel_trainer.data.documents import check_text, document_end, encode_documents
from automodel_trainer.data.mixed_stream import MixedStream, weights_of
from automodel_trainer.data.mixture import check_temperature, parse_sources
from automodel_trainer.data.option_checks import check_packing
from automodel_trainer.data.rows import Rows, StreamRows, TokenStore, digest
from automodel_trainer.data.sources import (
    describe_place,
    load_rows,
    load_validation_rows,
    open_stream,
    places_of,
    refuse_other_columns,
)
from automodel_trainer.data.stream import RowStream, StreamLoader, TokenStream
from automodel_trainer.data.tokens import check_columns, check_share, split_ids, tokenize
from automodel_trainer.data.unknown_tokens import unknown_share

PIECE = 4096
"""Maximum number of tokens per stored piece of a document: reading one row of a book does not read the whole book."""

_STREAMED = "Streamed rows are packed, and {}. Set streaming=False."


class TextDataModule(MicroBatchDataModule):
    """Raw text for pre-training: documents that end with EOS, laid end to end and cut into rows of `seq_len` tokens.

    Documents do not see each other: positions restart at each one. Every token is trained except the first token
    of a document, or of its part in a row.

    With `streaming=True`, text is read and tokenized during training and never loaded whole. Every rank reads the whole
    stream and takes its rows of each global batch. The batches are therefore the same on any number of ranks, and the
    saved position is exact to the token, also on another number of ranks. Blocks of `shuffle_buffer` documents are
    shuffled. `Trainer(max_steps=...)` determines when to stop. If one rank tokenizes more slowly than all ranks
    together train, tokenize in advance (`streaming=False`).

    Args:
        train: a txt (one document), jsonl, json, parquet, csv, tsv or arrow file, also compressed (gz, zst, bz2, xz); a
            folder or pattern of them, a URL of object storage, a folder written by `save_to_disk`, a Hub id, a
            `datasets.Dataset` or `DatasetDict`, or a list of dicts (docs/data.md). If streaming, also a
            `datasets.IterableDataset`.
        validation: the same, for validation; never streamed. None: the validation split that comes with `train`, if
            any (not if streaming).
        tokenizer: a tokenizer or the path of one. None: the model's, set by the Trainer.
        seq_len: tokens per row.
        micro_batch_size: rows per forward pass on one rank.
        global_batch_size: rows per optimizer step over all ranks. None: one micro-batch on each data-parallel rank,
            times the Trainer's accumulation.
        text_column: the column with the text.
        streaming: read and tokenize during training. Streamed rows are packed.
        packing: lay documents end to end and cut rows of `seq_len` tokens. False: cut each document by itself, so that
            its last row is shorter, and pad it. "auto": True where the model keeps documents apart, which is proved
            before training; the ledger says why not.
        val_split: share of the documents of `train` to hold out for validation if `validation` is None.
        seed: determines the order in each epoch, and the documents that `val_split` takes.
        shuffle_buffer: number of documents of a stream to shuffle at a time; 0 or 1 keeps the order of the stream.
        test: data for `Trainer.test`.
        num_workers: processes that build micro-batches ahead of time; at most 1 if streaming.
        drop_last: drop the last global batch of an epoch if it is incomplete, instead of filling it up.
        cache: keep the tokens on disk and read them from there next time.
        temperature: of a mixture (`train=[{path, weight, name}, …]`): shares are weight ^ (1 / temperature). A
            mixture of streams needs a weight for each source.

    Raises:
        ValueError: the data cannot be used for training (no rows, an unknown column, no text), or options contradict
            each other.
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
        packing: bool | Literal["auto"] = "auto",
        val_split: float = 0.0,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        test: str | Any | None = None,
        num_workers: int = 0,
        drop_last: bool = False,
        cache: bool = True,
        temperature: float = 1.0,
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
        check_packing(packing)
        if streaming and packing is False:
            raise ValueError(_STREAMED.format("packing=False asks for padded ones"))
        if streaming and num_workers > 1:
            raise ValueError(f"num_workers={num_workers}: a stream is read by at most one worker. Set it to 0 or 1.")
        self.train, self.validation, self.test = train, validation, test
        self.text_column = text_column
        self.streaming = streaming
        self.packing = packing
        self.val_split = val_split
        self.shuffle_buffer = shuffle_buffer
        self.cache = cache
        self.temperature = check_temperature(temperature)
        if streaming and (sources := parse_sources(train)) is not None:
            weights_of(sources)
        self._stream: RowStream | None = None

    def build_rows(self) -> dict[str, Rows]:
        """Read, tokenize and cut the documents of each split; if streaming, only open the stream for training.

        Raises:
            ValueError: the data cannot be used for training.
        """
        rows: dict[str, Rows] = {}
        if self.streaming:
            self._stream = self._open_stream()
        else:
            rows.update(self.training_rows(self.train, self.temperature, self._train_rows, self.seed))
        if self.validation is not None:
            rows.update(self.evaluation_rows("validation", self.validation, self._evaluation))
        if self.test is not None:
            rows["test"] = self._whole("test", load_rows(self.test, "test"))
        return rows

    def choose_packing(self, obstacle: str | None) -> None:
        """Pack documents, or cut and pad each by itself, as the model allows (`MicroBatchDataModule.choose_packing`).

        Raises:
            ValueError: it cannot pack, and `packing` is True or the text is streamed.
        """
        if self.streaming and obstacle is not None:
            raise ValueError(_STREAMED.format(f"this model cannot keep documents of a row apart: {obstacle}"))
        super().choose_packing(obstacle)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch. If streaming, the total number of steps (`max_steps`).

        Raises:
            ValueError: the data is streamed and the Trainer has no `max_steps`.
        """
        if not self.streaming:
            return super().steps_per_epoch
        if self.trainer is None:
            return sys.maxsize
        if self.trainer.max_steps < 1:
            raise ValueError("a stream has no end: set Trainer(max_steps=...) with TextDataModule(streaming=True).")
        return self.trainer.max_steps

    def build_train_loader(self) -> TrainLoader:
        """A loader that starts at the Trainer's current epoch, or at the beginning of the stream."""
        if not self.streaming:
            return super().build_train_loader()
        assert self._stream is not None, "prepare() opens the stream"
        layout = self._layout()
        for name in ("packed", "positions"):  # streamed rows are always packed, and full
            layout.pop(name)
        return StreamLoader(
            self._stream,
            steps=self.steps_per_epoch,
            global_batch_size=self.rows_per_step,
            num_workers=self.num_workers,
            **layout,
        )

    def summary(self) -> str:
        """A description of the data, one line per split."""
        streamed = [f"train: streamed in rows of {self.seq_len} tokens"] if self.streaming else []
        shares = [f"  {line}" for line in self.describe_shares()] if self.streaming else []
        return "\n".join(line for line in (*streamed, *shares, super().summary()) if line)

    @property
    def source_names(self) -> list[str]:
        """The names of the sources of a mixture, in the order of the micro-batches' `sources`; empty for another."""
        return list(self._stream.names) if self._stream is not None else super().source_names

    def describe_shares(self) -> list[str]:
        """A line for each source of a mixture: its share of the tokens."""
        return self._stream.describe_shares() if isinstance(self._stream, MixedStream) else super().describe_shares()

    def _evaluation(self, split: str, data: Any) -> Rows:
        return self._whole(split, load_rows(data, split.partition("/")[0]))

    def _train_rows(self, source: Any) -> dict[str, Rows]:
        train = load_rows(source, "train")
        if not self.val_split:
            rows = {"train": self._whole("train", train)}
            found = load_validation_rows(source) if self.validation is None else None
            return rows if found is None else {**rows, "validation": self._whole("validation", found)}
        store, key = self._pieces(train)
        taken = split_ids(len(train), self.val_split, self.seed)
        held_out = np.isin(store.sample_ids, taken)
        key = digest(key, self.val_split, self.seed)
        return {
            "train": self._rows("train", store, np.flatnonzero(~held_out), key, len(train) - len(taken)),
            "validation": self._rows("validation", store, np.flatnonzero(held_out), key, len(taken)),
        }

    def _whole(self, split: str, rows: Dataset) -> Rows:
        store, key = self._pieces(rows)
        return self._rows(split, store, np.arange(len(store)), key, len(rows))

    def _rows(self, split: str, store: TokenStore, pieces: np.ndarray, key: str, texts: int) -> Rows:
        """The rows made of some pieces, which come from `texts` rows of the data."""
        if len(pieces) == 0:
            raise ValueError(f"{self.called(split)}: no row has any text in column {self.text_column!r}.")
        made_by = (key, split, self.seq_len, *(() if self.packs else ("padded",)))
        found = StreamRows(store, pieces, self.seq_len, digest(*made_by), self.packs)
        if len(found) == 0:
            raise ValueError(f"{self.called(split)}: no document has two tokens, so there is nothing to predict.")
        empty = texts - len(np.unique(store.sample_ids[pieces]))
        found.stats = replace(found.stats, empty=empty, unknown=store.unknown)
        if empty:
            rank_zero_warn(
                f"{self.called(split)}: left out {empty:,} of {texts:,} rows without text in {self.text_column!r}."
            )
        return found

    def _pieces(self, rows: Dataset) -> tuple[TokenStore, str]:
        check_columns([self.text_column], rows.column_names)
        refuse_other_columns(rows, [self.text_column])
        tokenizer, column = self.load_tokenizer(), self.text_column
        document_end(tokenizer)  # fail early if there is no EOS token
        places = places_of(rows)

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            pieces: dict[str, list[Any]] = {"input_ids": [], "sample_id": []}
            texts = [check_text(x, column, describe_place(places, i)) for i, x in zip(indices, batch[column])]
            for index, ids in zip(indices, encode_documents(tokenizer, texts)):
                for start in range(0, len(ids), PIECE):
                    pieces["input_ids"].append(ids[start : start + PIECE])
                    pieces["sample_id"].append(index)
            return pieces

        settings = {"kind": "text", "text_column": column}
        samples, key = tokenize(rows, encode, tokenizer=tokenizer, settings=settings, masked=False, cache=self.cache)
        store = TokenStore(samples)
        named = f"{self._source}: " if self._source else ""
        store.unknown = unknown_share(store, tokenizer, named, lambda row: describe_place(places, row))
        return store, key

    def _open_stream(self) -> RowStream:
        rank_zero_info("streaming: every rank reads the whole stream and takes its rows of each global batch")
        sources = parse_sources(self.train)
        if sources is None:
            return self._stream_of(self.train)
        return MixedStream(sources, [self._stream_of(source.path) for source in sources], self.temperature)

    def _stream_of(self, source: Any) -> TokenStream:
        return TokenStream(
            open_stream(source),
            self.load_tokenizer(),
            seq_len=self.seq_len,
            text_column=self.text_column,
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer,
        )
