"""ChatDataModule: conversations in any of the usual formats, encoded with the tokenizer's own chat template."""

from __future__ import annotations

from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np
from datasets import Dataset, DatasetDict
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from automodel_trainer.data.base import MicroBatchDataModule
from automodel_trainer.data.built_in_templates import set_template
from automodel_trainer.data.chat_template import BatchEncoder, Encoded
from automodel_trainer.data.checks import check_samples
from automodel_trainer.data.formats import format_of, refuse_pictures, refuse_unwanted_answers
from automodel_trainer.data.messages import is_empty_turn
from automodel_trainer.data.mixture import check_temperature, parse_sources
from automodel_trainer.data.option_checks import check_packing
from automodel_trainer.data.packing import pack
from automodel_trainer.data.rows import Rows, RowStats, SampleRows, TokenStore, digest
from automodel_trainer.data.sources import (
    describe_place,
    load_rows,
    load_validation_rows,
    places_of,
    refuse_other_columns,
)
from automodel_trainer.data.tokens import check_share, split_ids, tokenize
from automodel_trainer.data.unknown_tokens import unknown_share
from automodel_trainer.nn.content_parts import any_wants_parts

CHECKED = 200
"""Number of samples, spread over the data, whose BOS, EOS and mask are checked at each start."""


class ChatDataModule(MicroBatchDataModule):
    """Conversations for supervised fine-tuning: messages, ShareGPT, prompt/completion or instruction columns.

    The tokenizer's chat template turns every row into a sample. Only the tokens that `loss_on` selects are trained.
    Samples are packed into rows of `seq_len` tokens without seeing each other. Where the model cannot do that, they are
    padded.

    Args:
        train: a jsonl, json, parquet, csv, tsv or arrow file, also compressed (gz, zst, bz2, xz); a folder or pattern
            of them, a URL of object storage, a folder written by `save_to_disk`, a Hub id, a `datasets.Dataset` or
            `DatasetDict`, or a list of dicts (docs/data.md).
        validation: the same, for validation, or several by name (`{name: data}`). None: the validation split that comes
            with `train`, if any.
        tokenizer: a tokenizer or the path of one. None: the model's, set by the Trainer.
        seq_len: tokens per row.
        micro_batch_size: rows per forward pass on one rank.
        global_batch_size: rows per optimizer step over all ranks. None: one micro-batch on each data-parallel rank,
            times the Trainer's accumulation.
        packing: put several samples into a row; they do not see each other. False: one padded sample per row, with
            rows of similar length in the same batch. "auto": True where the model keeps samples apart, which is proved
            before training; the ledger says why not.
        loss_on: "assistant" trains every assistant turn, "last_turn" the last one, "all" every token.
        val_split: share of `train` to hold out for validation if `validation` is None.
        seed: determines the order of the rows in each epoch, and the rows that `val_split` takes.
        columns: maps names that this project knows to your column names, such as `{"messages": "dialog"}` or
            `{"prompt": "question", "completion": "answer"}`. None: detect the format.
        overlong: what to do with samples longer than `seq_len`: "drop" them, "truncate" their end, or stop with an
            "error". They are counted and reported in every case.
        test: data for `Trainer.test`.
        num_workers: processes that build micro-batches ahead of time.
        drop_last: drop the last global batch of an epoch if it is incomplete, instead of filling it up.
        cache: keep the tokenized samples on disk and read them from there next time.
        chat_template: replaces the tokenizer's: `chatml`, `plain`, a Jinja file, or the template's text. It goes into
            every checkpoint and export.
        temperature: of a mixture (`train=[{path, weight, name}, …]`): shares are weight ^ (1 / temperature).

    Raises:
        ValueError: the data cannot be used for training (no rows, unknown columns, no supervised token, all samples
            too long), or an option has a bad value.
    """

    rows_class: ClassVar[Any] = SampleRows

    def __init__(
        self,
        train: str | Any,
        validation: str | Any | None = None,
        *,
        tokenizer: str | Any | None = None,
        seq_len: int = 2048,
        micro_batch_size: int = 1,
        global_batch_size: int | None = None,
        packing: bool | Literal["auto"] = "auto",
        loss_on: Literal["assistant", "last_turn", "all"] = "assistant",
        val_split: float = 0.0,
        seed: int = 0,
        columns: dict[str, str] | None = None,
        overlong: Literal["drop", "truncate", "error"] = "drop",
        test: str | Any | None = None,
        num_workers: int = 0,
        drop_last: bool = False,
        cache: bool = True,
        temperature: float = 1.0,
        chat_template: str | None = None,
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
        check_packing(packing)
        _check_choice("loss_on", loss_on, ("assistant", "last_turn", "all"))
        _check_choice("overlong", overlong, ("drop", "truncate", "error"))
        check_share(val_split)
        if val_split and validation is not None:
            raise ValueError(f"validation and val_split={val_split} are both given: set only one of them.")
        self.train, self.validation, self.test = train, validation, test
        self.packing = packing
        self.loss_on = loss_on
        self.val_split = val_split
        self.columns = columns
        self.overlong = overlong
        self.cache = cache
        self.temperature = check_temperature(temperature)
        self.chat_template = chat_template

    def load_tokenizer(self) -> Any:
        """The tokenizer, with `chat_template` if one was given.

        Raises:
            ValueError: there is no tokenizer, or no such template.
        """
        tokenizer = super().load_tokenizer()
        if self.chat_template is not None:
            set_template(tokenizer, self.chat_template)
        return tokenizer

    def build_rows(self) -> dict[str, Rows]:
        """Read, encode and pack the conversations of each split.

        Raises:
            ValueError: the data cannot be used for training.
        """
        rows = self.training_rows(self.train, self.temperature, self._training_source, self.seed)
        if self.validation is not None:
            rows = {"train": rows["train"], **self.evaluation_rows("validation", self.validation, self._evaluation)}
        if self.test is not None:
            rows["test"] = self._evaluation("test", self.test)
        return rows

    def _training_source(self, train: Any) -> dict[str, Rows]:
        store, key = self._samples(self.read(train, "train"))
        everything = np.arange(len(store))
        if self.val_split:
            held_out = split_ids(len(store), self.val_split, self.seed)
            return {
                "train": self._rows("train", store, np.setdiff1d(everything, held_out), key),
                "validation": self._rows("validation", store, held_out, key),
            }
        rows = {"train": self._rows("train", store, everything, key)}
        found = self._validation_rows(train) if self.validation is None else None
        return rows if found is None else {**rows, "validation": self._whole("validation", found)}

    def _evaluation(self, split: str, data: Any) -> Rows:
        return self._whole(split, self.read(data, split.partition("/")[0]))

    def read(self, data: Any, split: str) -> Dataset:
        """The rows of one split of a source; see `load_rows`.

        Raises:
            ValueError: they cannot be read, or hold what this data module would leave out.
        """
        rows = load_rows(data, split)
        refuse_pictures(rows.column_names, self.columns)
        return rows

    def sample_prompts(self, count: int) -> list[str]:
        """At most `count` prompts to try a model on: first user turns of the validation data, or of the train data."""
        rows = self.prompt_rows()
        form = format_of(rows, self.columns)
        conversations = (form.to_messages(rows[index], index).messages for index in range(len(rows)))
        questions = (first_user_turn(messages) for messages in conversations)
        return list(islice(filter(None, questions), count))

    def prompt_rows(self) -> Dataset:
        """The rows to take prompts from: those of validation, or of training if there are none."""
        sources = parse_sources(self.train)
        train = self.train if sources is None else sources[0].path
        rows = self._validation_rows(train)
        if rows is not None:
            return rows
        rows = self.read(train, "train")
        return rows.select(split_ids(len(rows), self.val_split, self.seed)) if self.val_split else rows

    def _validation_rows(self, train: Any) -> Dataset | None:
        if self.validation is None:
            return load_validation_rows(train)
        given: Any = self.validation
        named = isinstance(given, dict) and not isinstance(given, DatasetDict)
        first = next(iter(given.values())) if named else given
        return self.read(first, "validation")

    def _whole(self, split: str, rows: Dataset) -> Rows:
        store, key = self._samples(rows)
        return self._rows(split, store, np.arange(len(store)), key)

    def _samples(self, rows: Dataset) -> tuple[TokenStore, str]:
        """All rows as tokens, and their fingerprint."""
        tokenizer, loss_on = self.load_tokenizer(), self.loss_on
        form = format_of(rows, self.columns)
        refuse_other_columns(rows, form.data_columns)
        refuse_unwanted_answers(rows, form)
        self._name_unread(rows, form.name, set(form.columns_read.values()))
        places = places_of(rows)

        encoder = BatchEncoder(tokenizer, loss_on)

        def encode_batch(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            placed, empty = [], []
            for position, index in enumerate(indices):
                row = {name: values[position] for name, values in batch.items()}
                try:
                    conversation = form.to_messages(row)
                    placed.append(encoder.place(conversation))
                except ValueError as error:
                    raise ValueError(f"{describe_place(places, index)}: {error}") from error
                empty.append(sum(map(is_empty_turn, conversation.messages)))
            encoded = encoder.encode(placed)
            return {
                "input_ids": [sample.input_ids for sample in encoded],
                "trained": [sample.trained for sample in encoded],
                "sample_id": indices,
                "empty_turns": empty,
            }

        settings: dict[str, Any] = {"kind": "chat", "loss_on": loss_on, "columns": self.columns}
        if "history" in form.columns_read and form.columns_read["history"] in rows.column_names:
            settings["history"] = True  # samples were made without it once
        if any_wants_parts(tokenizer.chat_template, tokenizer.special_tokens_map):
            settings["parts"] = True  # samples were made without their texts once
        if added := form.columns_added(rows.column_names):
            settings["columns read"] = added
        samples, key = tokenize(
            rows, encode_batch, tokenizer=tokenizer, settings=settings, masked=True, cache=self.cache
        )
        store = TokenStore(samples)
        self._check(store)
        self._report_turns(store, rows)
        return store, key

    def _report_turns(self, store: TokenStore, rows: Dataset) -> None:
        """Say which conversations have empty turns, and how much of the text the tokenizer does not know."""
        places = places_of(rows)
        named = f"{self._source}: " if self._source else ""
        if len(empty := np.flatnonzero(store.empty_turns)):
            shown = [describe_place(places, int(i)) for i in store.sample_ids[empty[:3]]]
            rank_zero_warn(
                f"{named}{len(empty):,} conversations have a turn without content or calls, of the user or the "
                f"assistant: {', '.join(shown)}{', …' if len(empty) > 3 else ''}. Of one of the assistant the model "
                'learns to say nothing. Remove these turns, or set "weight": 0 in them.'
            )
        store.unknown = unknown_share(store, self.load_tokenizer(), named, lambda row: describe_place(places, row))

    def _name_unread(self, rows: Dataset, form: str, read: set[str]) -> list[str]:
        """Say which columns are not read, so that nobody believes that the model sees them; returns them."""
        if unread := [name for name in rows.column_names if name not in read]:
            named = f"{self._source}: " if self._source else ""
            rank_zero_info(f"{named}read as {form}. Columns that are not read: {', '.join(unread)}.")
        return unread

    def _check(self, store: TokenStore) -> None:
        """Refuse data that would train wrongly without an error. Checks `CHECKED` samples that have trained tokens."""
        # Samples without a trained token will be left out, so check them only if there are no others.
        useful = np.flatnonzero(store.supervised > 0)
        if len(useful) == 0:
            useful = np.arange(len(store))
        chosen = useful[np.linspace(0, len(useful) - 1, min(len(useful), CHECKED), dtype=np.int64)]
        documents = store.fetch(chosen.tolist())
        check_samples(self.tokenizer, [Encoded(d.input_ids.tolist(), d.trained.tolist()) for d in documents])

    def _rows(self, split: str, store: TokenStore, indices: np.ndarray, key: str) -> Rows:
        """The rows of a split, without samples that are too long (or cut off) and those without a supervised token."""
        overlong = store.lengths[indices] > self.seq_len
        self._report_overlong(split, store, indices[overlong], len(indices))
        kept = indices if self.overlong == "truncate" else indices[~overlong]
        supervised = store.count_supervised(kept, self.seq_len)
        kept, without = kept[supervised > 0], int((supervised == 0).sum())
        if len(kept) == 0:
            raise ValueError(self._nothing_left(split, int(overlong.sum()), without))
        if without:
            rank_zero_warn(f"{self.called(split)}: left out {without:,} samples without a supervised token.")
        lengths = np.minimum(store.lengths[kept], self.seq_len)
        packed = self.group(store, kept) if self.packs else range(len(kept))
        groups = [kept[group].reshape(-1) for group in packed]
        tokens = int(lengths.sum())
        stats = RowStats(
            samples=len(kept),
            rows=len(groups),
            tokens=tokens,
            supervised=int(supervised.sum()),
            capacity=len(groups) * self.seq_len if self.packs else tokens,  # the width of padded rows varies
            overlong=int(overlong.sum()),
            overlong_action="truncated" if self.overlong == "truncate" else "dropped",
            unsupervised=without,
            unknown=store.unknown,
        )
        made_by = (
            key,
            split,
            self.seq_len,
            self.packs,
            self.overlong,
            self.val_split and (self.val_split, self.seed),  # without a split, the rows do not depend on the seed
        )
        return self.rows_class(store, groups, self.seq_len, stats, digest(*made_by))

    def group(self, store: TokenStore, kept: np.ndarray) -> list[list[int]]:
        """Which samples share a row: positions in `kept`, the samples of a split that are not left out."""
        return pack(np.minimum(store.lengths[kept], self.seq_len), self.seq_len)

    def _report_overlong(self, split: str, store: TokenStore, overlong: np.ndarray, total: int) -> None:
        if len(overlong) == 0:
            return
        ids, longest = store.sample_ids[overlong][:5].tolist(), int(store.lengths[overlong].max())
        text = (
            f"{self.called(split)}: {len(overlong):,} of {total:,} samples are longer than seq_len={self.seq_len} "
            f"(the longest has {longest:,} tokens; rows {ids}{' ...' if len(overlong) > 5 else ''})"
        )
        if self.overlong == "error":
            raise ValueError(f"{text}. Raise seq_len, or set overlong='drop' or overlong='truncate'.")
        rank_zero_warn(f"{text}: {'their end is cut off' if self.overlong == 'truncate' else 'they are dropped'}.")

    def _nothing_left(self, split: str, overlong: int, without: int) -> str:
        return (
            f"{self.called(split)}: no sample is left to train on: {overlong:,} are longer than "
            f"seq_len={self.seq_len} and {without:,} have no supervised token with loss_on={self.loss_on!r}. For "
            "samples that are too long, raise seq_len or set overlong='truncate'. For samples without a supervised "
            "token, set loss_on='all' or check the data."
        )


def first_user_turn(messages: list[dict[str, Any]]) -> str | None:
    """The text of the first user turn; None if there is none or it is not text."""
    turns = (message.get("content") for message in messages if message["role"] == "user")
    first = next(turns, None)
    return first if isinstance(first, str) else None


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown. Allowed: {', '.join(map(repr, allowed))}.")
