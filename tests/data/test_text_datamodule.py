from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from automodel_trainer.data import TextDataModule, text
from automodel_trainer.data.loader import MicroBatchLoader
from automodel_trainer.data.stream import StreamLoader
from automodel_trainer.nn.constants import IGNORE_INDEX
from tests.data.test_loader import Recorder
from tests.harness import close
from tests.tiny import tiny_model, tiny_tokenizer

EOS = 4


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def documents(count: int = 40) -> list[dict]:
    generator = np.random.default_rng(1)
    return [
        {"text": f"{i}:" + "".join(map(str, generator.integers(0, 9, generator.integers(1, 90))))} for i in range(count)
    ]


def module(train: Any = None, **options: Any) -> TextDataModule:
    defaults: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "seq_len": 32}
    data = TextDataModule(documents() if train is None else train, **{**defaults, **options})
    data.setup("fit")
    return data


def stream(train: Any = None, **options: Any) -> TextDataModule:
    return module(train, **{"streaming": True, "shuffle_buffer": 7, **options})


def tokens_of(steps: Any) -> list[tuple[int, ...]]:
    """The rows of some steps, as tokens."""
    return [tuple(row.tolist()) for step in steps for batch in step for row in batch["input_ids"]]


def laid_end_to_end(rows: list[dict]) -> list[int]:
    tokenizer = tiny_tokenizer()
    return [token for row in rows for token in [*tokenizer(row["text"])["input_ids"], EOS]]


@pytest.mark.parametrize("piece", [5, 4096])
def test_rows_are_the_documents_end_to_end(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE", piece)
    data = module()
    expected = laid_end_to_end(documents())
    rows = data.rows["train"]
    everything = [token for i in range(len(rows)) for d in rows.fetch([i])[0] for token in d.input_ids]
    assert everything == expected
    assert rows.lengths.tolist() == [32] * (len(expected) // 32) + [len(expected) % 32]
    stats = rows.stats
    assert (stats.samples, stats.rows, stats.tokens) == (40, -(-len(expected) // 32), len(expected))
    steps = list(data.train_dataloader())
    assert sorted(tokens_of(steps))[-1] in [tuple(expected[i : i + 32]) for i in range(0, len(expected), 32)]
    labels = torch.cat([batch["labels"] for step in steps for batch in step])
    assert int((labels != IGNORE_INDEX).sum()) == stats.supervised


def test_every_token_is_trained_but_the_first_of_each_document_and_row() -> None:
    rows = documents()
    starts, position = set(), 0
    for row in rows:
        starts.add(position)
        position += len(laid_end_to_end([row]))
    data = module(rows)
    loader = data.train_dataloader()
    batches = [batch for step in loader for batch in step]
    order = loader.global_batches(0).flatten()  # type: ignore[attr-defined]
    for row, batch in zip(order, batches, strict=True):
        length = data.rows["train"].lengths[row]
        first = [i == 0 or int(row) * 32 + i in starts for i in range(length)]
        assert (batch["labels"][0, :length] == IGNORE_INDEX).tolist() == first
        assert (batch["position_ids"][0, :length] == 0).tolist() == first
        assert (batch["labels"][0, length:] == IGNORE_INDEX).all()


def test_attention_does_not_cross_documents() -> None:
    model = tiny_model().eval()
    batch = next(iter(module([{"text": "abcdefgh"}, {"text": "ijklmnopqrst"}]).train_dataloader()))[0]
    ends = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = model(input_ids=batch["input_ids"][:, ends[1] : ends[2]], use_cache=False).logits
    close(packed[:, ends[1] : ends[2]], alone)


def test_validation_is_apart_from_training() -> None:
    data = module(val_split=0.25)
    train = {i for step in data.train_dataloader() for batch in step for i in batch["sample_ids"]}
    validation = {i for step in data.val_dataloader() for batch in step for i in batch["sample_ids"]}
    assert len(validation) == 10
    assert train | validation == set(range(40))
    assert not train & validation


def test_a_text_file_and_the_second_look_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one line\n\nanother line\n" * 20)
    first = module(str(path))
    assert first.rows["train"].stats.samples == 1
    monkeypatch.setattr(text, "encode_documents", None)
    assert tokens_of(module(str(path)).train_dataloader()) == tokens_of(first.train_dataloader())


def test_documents_begin_and_end_once() -> None:
    """Also a text that was rendered with BOS and EOS, and a tokenizer that adds both."""
    tokenizer = tiny_tokenizer(eos_token="</s>")
    parts = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=parts)
    once = [tokenizer.bos_token_id, *tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert text.encode_documents(tokenizer, ["a", "<s>a", "a</s>", "<s>a</s>", ""]) == [once] * 4 + [[]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": "2"}, "micro_batch_size='2' is a str and must be a whole number"),
        ({"global_batch_size": 4.0}, "global_batch_size=4.0 is a float"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"seed": None}, "seed=None is a NoneType"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"validation": ""}, "the name of the data is empty"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no column 'body'; its columns are \['text'\]"):
        module(text_column="body")
    with pytest.raises(ValueError, match="no row of the data has any text"):
        module([{"text": ""}, {"text": None}])
    with pytest.raises(ValueError, match="no eos_token"):
        module(tokenizer=tiny_tokenizer(eos_token=None))
    with pytest.raises(ValueError, match=r"no column 'body'; its columns are \['text'\]"):
        stream(text_column="body")
    with pytest.raises(ValueError, match="has any text"):
        next(iter(stream([{"text": ""}]).train_dataloader()))
    with pytest.raises(ValueError, match="at most one worker"):
        stream(num_workers=2)
    with pytest.raises(ValueError, match="a stream cannot be split"):
        stream(val_split=0.1)
    assert module([{"text": ""}, {"text": "abc"}]).rows["train"].stats.samples == 1


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    """In the summary of each split and by a warning; a value that is no text is named with its file and row."""
    rows = [{"text": text} for text in ("one two", None, "three four", "", "five six", "seven")]
    with pytest.warns(UserWarning, match=r"train: left out 2 of 6 rows without text in 'text'"):
        data = module(rows)
    assert data.summary().endswith("; 2 rows without text left out")
    with pytest.warns(UserWarning, match="left out"):
        split = module(rows, val_split=0.5)
    assert sum(part.stats.empty for part in split.rows.values()) == 2
    assert sum(part.stats.samples for part in split.rows.values()) == 4
    with pytest.warns(UserWarning, match="train/a: left out 2 of 6"):
        mixed = module(
            [{"path": rows, "weight": 1, "name": "a"}, {"path": [{"text": "x y"}], "weight": 1, "name": "b"}]
        )
    assert mixed.rows["train"].stats.empty == 2
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    for options in ({}, {"streaming": True}):
        with pytest.raises(ValueError, match=r"row 1 of the .*column 'text' must hold texts, found int"):
            next(iter(module(str(tmp_path / "a.jsonl"), **options).train_dataloader()))


def test_a_stream_has_every_document_once_an_epoch() -> None:
    expected = [tuple(laid_end_to_end([row])) for row in documents()]
    total = sum(map(len, expected))
    rows = tokens_of(islice(stream().train_dataloader(), 2 * total // 32 + 1))
    flat = [token for row in rows for token in row]
    found, document = [], []
    for token in flat[: 2 * total]:
        document.append(token)
        if token == EOS:
            found.append(tuple(document))
            document = []
    assert Counter(found[:40]) == Counter(found[40:]) == Counter(expected)
    assert found[:40] != expected != found[40:] != found[:40]
    unshuffled = tokens_of(islice(stream(shuffle_buffer=0).train_dataloader(), 3))
    assert [token for row in unshuffled for token in row] == [t for row in expected for t in row][:96]


def loader(dp_rank: int = 0, dp_size: int = 1, micro: int = 1, **options: Any) -> StreamLoader:
    data = stream(global_batch_size=8, micro_batch_size=micro, **options)
    strategy = SimpleNamespace(dp_rank=dp_rank, dp_size=dp_size)
    data.trainer = SimpleNamespace(strategy=strategy, max_steps=20)  # type: ignore[assignment]
    made = data.train_dataloader()
    assert isinstance(made, StreamLoader)
    return made


@pytest.mark.parametrize("dp_size", [2, 4])
def test_streamed_global_batches_do_not_depend_on_the_layout(dp_size: int) -> None:
    ranks = [loader(rank, dp_size, micro=2) for rank in range(dp_size)]
    for step, *shares in zip(loader(), *ranks, strict=True):
        assert Counter(tokens_of([step])) == Counter(tokens_of(shares))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("stop", [1, 7, 13])
def test_a_stream_goes_on_exactly_also_on_another_layout(stop: int, num_workers: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in documents()))
    reference = [Counter(tokens_of([step])) for step in loader(train=str(path))]
    assert len(reference) == 20
    interrupted = loader(train=str(path), num_workers=num_workers)
    assert [Counter(tokens_of([step])) for step in islice(interrupted, stop)] == reference[:stop]
    state = json.loads(json.dumps(interrupted.state_dict()))
    resumed = [loader(rank, 2, train=str(path), num_workers=num_workers) for rank in range(2)]
    for one in resumed:
        one.load_state_dict(state)
    assert [Counter(tokens_of(shares)) for shares in zip(*resumed, strict=True)] == reference[stop:]


def test_a_stream_position_is_refused_where_files_changed(tmp_path: Path) -> None:
    """Lines and files may be added at the end: the place means the same."""
    lines = [json.dumps(row) + "\n" for row in documents()]

    def write(name: str, chosen: list[str]) -> None:
        (tmp_path / name).write_text("".join(chosen))

    write("a.jsonl", lines[:5]), write("b.jsonl", lines[5:20])
    interrupted = loader(train=str(tmp_path), shuffle_buffer=0)
    steps = iter(interrupted)
    next(steps)
    state, following = json.loads(json.dumps(interrupted.state_dict())), tokens_of([next(steps)])
    write("b.jsonl", lines[5:]), write("c.jsonl", lines[:2])
    grown = loader(train=str(tmp_path), shuffle_buffer=0)
    grown.load_state_dict(state)
    assert tokens_of([next(iter(grown))]) == following
    write("a.jsonl", lines[1:6])
    with pytest.raises(ValueError, match=r"a\.jsonl is not as it was.*resume='data'"):
        loader(train=str(tmp_path), shuffle_buffer=0).load_state_dict(state)
    write("a.jsonl", lines[:5]), write("aa.jsonl", lines[:5])
    with pytest.raises(ValueError, match=r"file 2 of the stream was b\.jsonl, and now aa\.jsonl"):
        loader(train=str(tmp_path), shuffle_buffer=0).load_state_dict(state)


def test_a_stream_position_is_refused_with_other_settings() -> None:
    with pytest.raises(ValueError, match="shuffle_buffer"):
        loader(shuffle_buffer=3).load_state_dict(loader().state_dict())


class TokenRecorder(Recorder):
    def training_step(self, batch: list[dict], batch_idx: int) -> None:
        self.seen.append([hash(row) for row in tokens_of([batch])])
        self.optimizers().step()


def test_lightning_resumes_a_stream_exactly(tmp_path: Path) -> None:
    def fit(steps: int, resume: Path | None = None) -> tuple[pl.Trainer, list]:
        data, recorder = stream(Dataset.from_list(documents()), global_batch_size=4), TokenRecorder()
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(recorder, data, ckpt_path=resume, weights_only=False if resume else None)
        return trainer, recorder.seen

    _, whole = fit(9)
    trainer, first = fit(5)
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    _, rest = fit(9, tmp_path / "five.ckpt")
    assert first + rest == whole
    assert len(whole) == 9
    with pytest.raises(ValueError, match="max_steps"):
        fit(-1)


@pytest.mark.parametrize("line", ['{"text": 5}', '{"body": "x"}', "{oops"], ids=["a number", "no column", "no JSON"])
def test_what_a_worker_refuses_is_told_as_without_workers(tmp_path: Path, line: str) -> None:
    """The message names the file and the row, and has nothing of torch's around it."""
    good = [json.dumps(row) for row in documents(12)]
    for name, rows in (("a", good[:5]), ("b", [*good[5:8], line, *good[8:]])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    told = []
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"\(row 3 of .*b\.jsonl\)|b\.jsonl line 4") as error:
            list(loader(train=str(tmp_path), num_workers=workers, shuffle_buffer=1))
        told.append(str(error.value))
    assert told[0] == told[1]


def test_what_a_worker_cannot_fetch_is_told_as_without_workers() -> None:
    class Spoilt:
        fingerprint, width, longest, lengths = "", 16, 16, np.full(4, 16)

        def __len__(self) -> int:
            return 4

        def fetch(self, rows: list[int]) -> list[Any]:
            raise ValueError(f"row {rows[0]} of a.jsonl is spoilt")

    for workers in (0, 1):
        rows: Any = Spoilt()
        with pytest.raises(ValueError, match=r"^row 0 of a\.jsonl is spoilt$"):
            next(
                iter(
                    MicroBatchLoader(rows, micro_batch_size=1, global_batch_size=1, shuffle=False, num_workers=workers)
                )
            )
