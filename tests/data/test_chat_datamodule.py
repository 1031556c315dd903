from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict

from automodel_trainer.data import ChatDataModule, MicroBatchDataModule, chat
from automodel_trainer.data.cache import cache_key, load_or_build
from automodel_trainer.nn.constants import IGNORE_INDEX
from tests.harness import close
from tests.tiny import CHATML, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def conversations(count: int = 60, longest: int = 12) -> list[dict]:
    generator = np.random.default_rng(0)

    def words() -> str:
        return " ".join(f"w{generator.integers(100)}" for _ in range(generator.integers(1, longest)))

    return [
        {"messages": [{"role": "user", "content": words()}, {"role": "assistant", "content": words()}]}
        for _ in range(count)
    ]


def module(train: Any = None, **options: Any) -> ChatDataModule:
    defaults: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "seq_len": 256}
    data = ChatDataModule(conversations() if train is None else train, **{**defaults, **options})
    data.setup("fit")
    return data


def pairs(steps: Any) -> Counter:
    found: Counter = Counter()
    for batch in (batch for step in steps for batch in step):
        labels, tokens = batch["labels"][:, 1:], batch["input_ids"][:, :-1]
        kept = labels != IGNORE_INDEX
        found.update(zip(tokens[kept].tolist(), labels[kept].tolist()))
    return found


def sample_ids(steps: Any) -> list[int]:
    return [i for step in steps for batch in step for i in batch["sample_ids"]]


def test_every_sample_is_in_an_epoch_once_and_only_answers_are_trained() -> None:
    rows, tokenizer = conversations(), tiny_tokenizer()
    data = module(rows, micro_batch_size=2, global_batch_size=4)
    steps = list(data.train_dataloader())
    assert len(steps) == data.steps_per_epoch
    assert sorted(sample_ids(steps)) == list(range(60))
    assert all(batch["input_ids"].shape == (2, 256) and len(step) == 2 for step in steps for batch in step)
    answers = sorted(row["messages"][1]["content"] + "<|im_end|>" for row in rows)
    trained = []
    for batch in (batch for step in steps for batch in step):
        for labels, positions in zip(batch["labels"], batch["position_ids"]):
            for document in torch.tensor_split(labels, (positions == 0).nonzero().flatten()):
                if (document != IGNORE_INDEX).any():
                    trained.append(tokenizer.decode(document[document != IGNORE_INDEX]))
    assert sorted(trained) == answers


def test_packed_and_padded_supervise_the_same_tokens() -> None:
    packed, padded = (module(packing=packing, global_batch_size=4).train_dataloader() for packing in (True, False))
    assert pairs(packed) == pairs(padded)
    assert pairs(packed).total() > 500
    first = next(iter(padded))[0]
    assert first["attention_mask"].shape == first["input_ids"].shape


def test_packed_rows_have_the_loss_of_each_conversation_alone() -> None:
    model = tiny_model().eval()

    def loss(batch: dict) -> torch.Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask") if key in batch}
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[:, :-1].transpose(1, 2)
        return torch.nn.functional.cross_entropy(
            logits, batch["labels"][:, 1:], reduction="sum", ignore_index=IGNORE_INDEX
        )

    rows = conversations(12)
    packed = sum(loss(batch) for step in module(rows).train_dataloader() for batch in step)
    alone = sum(loss(batch) for step in module(rows, packing=False).train_dataloader() for batch in step)
    assert packed > 0
    close(packed, alone)


def test_many_short_samples_fill_98_percent_of_the_rows_and_the_summary_says_so() -> None:
    data = module(conversations(600), seq_len=512)
    stats = data.rows["train"].stats
    assert stats.tokens / stats.capacity >= 0.98
    assert stats.tokens == int(data.rows["train"].lengths.sum())
    share = f"{stats.supervised / stats.tokens:.1%} supervised"
    assert "600 samples" in data.summary()
    assert share in data.summary()
    assert pairs(data.train_dataloader()).total() == stats.supervised


def test_long_samples_are_counted_and_never_cut_unasked() -> None:
    rows = conversations(20)
    rows[7]["messages"][1]["content"] = "long " * 100
    with pytest.warns(UserWarning, match=r"1 of 20 samples are longer than seq_len=256.*rows \[7\].*dropped"):
        dropped = module(rows)
    assert 7 not in sample_ids(dropped.train_dataloader())
    assert dropped.rows["train"].stats.overlong == 1
    assert "1 samples longer than seq_len dropped" in dropped.summary()
    with pytest.warns(UserWarning, match="their end is cut off"):
        cut = module(rows, overlong="truncate")
    assert 7 in sample_ids(cut.train_dataloader())
    assert pairs(cut.train_dataloader()).total() == cut.rows["train"].stats.supervised
    with pytest.raises(ValueError, match=r"longer than seq_len=256.*overlong='drop'"):
        module(rows, overlong="error")


@pytest.mark.filterwarnings("ignore:.*samples")
def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="60 are longer than seq_len=8"):
        module(seq_len=8)
    questions = [{"messages": row["messages"][:1]} for row in conversations(5)]
    with pytest.raises(ValueError, match="supervised"):
        module(questions)
    assert module(questions, loss_on="all").rows["train"].stats.samples == 5


@pytest.mark.filterwarnings("ignore:.*samples")
def test_samples_that_train_nothing_are_left_out_and_counted() -> None:
    rows = conversations(10)
    rows[3] = {"messages": rows[3]["messages"][:1]}
    data = module(rows)
    assert data.rows["train"].stats.unsupervised == 1
    assert sorted(sample_ids(data.train_dataloader())) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_validation_is_apart_from_training_and_its_order_fixed() -> None:
    data = module(val_split=0.2)
    train, validation = sample_ids(data.train_dataloader()), sample_ids(data.val_dataloader())
    assert sorted(train + validation) == list(range(60))
    assert len(validation) == 12
    loader = data.val_dataloader()
    assert sample_ids(loader) == sample_ids(loader) == validation
    assert sorted(sample_ids(module(val_split=0.2, seed=1).val_dataloader())) != sorted(validation)
    assert module().val_dataloader() == []


def test_the_validation_split_of_a_data_set_is_used() -> None:
    both = DatasetDict(train=Dataset.from_list(conversations(9)), validation=Dataset.from_list(conversations(4)))
    data = module(both, test=conversations(3))
    assert [len(sample_ids(loader)) for loader in (data.train_dataloader(), data.val_dataloader())] == [9, 4]
    assert len(sample_ids(data.test_dataloader())) == 3
    assert len(sample_ids(data.predict_dataloader())) == 3
    assert len(sample_ids(module(conversations(9), validation=conversations(2)).val_dataloader())) == 2


def test_validation_with_the_samples_of_training_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("automodel_trainer.data.base.rank_zero_info", said.append)
    rows = conversations(6)
    module(rows, validation={"same": rows, "other": conversations(7)[1:]})
    assert [line for line in said if "by heart" in line] == [
        "validation/same has the samples of the training data: its loss shows what is learned by heart."
    ]


def test_columns_are_mapped_by_name_and_unknown_ones_refused() -> None:
    rows = [{"frage": f"f{i}", "antwort": f"a{i}"} for i in range(8)]
    data = module(rows, columns={"prompt": "frage", "completion": "antwort"})
    assert "a3" in tiny_tokenizer().decode([t for r in data.rows["train"].fetch([0]) for d in r for t in d.input_ids])
    with pytest.raises(ValueError, match="nichts"):
        module(rows, columns={"prompt": "nichts", "completion": "antwort"})
    with pytest.raises(ValueError, match="frage"):
        module(rows)


def test_a_bad_row_is_named() -> None:
    rows = conversations(5)
    rows[3]["messages"] = []
    with pytest.raises(ValueError, match="row 3"):
        module(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len=1"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"global_batch_size": -4}, "global_batch_size=-4"),
        ({"val_split": 1.0}, "val_split=1.0"),
        ({"val_split": 0.1, "validation": []}, "both given"),
        ({"loss_on": "user"}, "loss_on='user'"),
        ({"overlong": "cut"}, "overlong='cut'"),
    ],
)
def test_bad_settings_are_refused_before_any_work(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatDataModule([], **options)


def test_batch_sizes_must_fit_the_layout() -> None:
    data = module(micro_batch_size=2, global_batch_size=12)
    assert data.rows_per_step == 12
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(dp_rank=1, dp_size=4))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"=12 .*micro_batch_size=2 times dp_size=4 \(= 8\).*: 8 or 16"):
        data.setup("fit")
    data.global_batch_size = None
    assert data.rows_per_step == 8
    data.trainer.micro_batches_per_step = 3  # type: ignore[attr-defined,union-attr]
    assert data.rows_per_step == 24
    assert (data.dp_rank, data.dp_size) == (1, 4)
    with pytest.raises(ValueError, match="drop_last leaves nothing"):
        module(global_batch_size=1000, drop_last=True)


def test_a_tokenizer_is_needed_and_may_be_a_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        module(tokenizer=None)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert pairs(module(tokenizer=str(tmp_path / "tokenizer")).train_dataloader()) == pairs(module().train_dataloader())


def test_the_cache_is_hit_the_second_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list(module().train_dataloader())
    folders = [path for path in cache.iterdir() if path.is_dir()]
    assert len(folders) == 1

    def refuse(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(chat.BatchEncoder, "place", refuse)
    second = list(module().train_dataloader())
    assert all(torch.equal(a[0]["labels"], b[0]["labels"]) for a, b in zip(first, second, strict=True))
    module(seq_len=128, packing=False, seed=4)  # what forms rows asks for no new tokens
    with pytest.raises(AssertionError, match="tokenised again"):
        module(loss_on="all")
    with pytest.raises(AssertionError, match="tokenised again"):
        module(tokenizer=tiny_tokenizer(CHATML + " "))
    with pytest.raises(AssertionError, match="tokenised again"):
        module(conversations(61))
    assert [path for path in cache.iterdir() if path.is_dir()] == folders


def test_without_cache_nothing_is_written(cache: Path) -> None:
    assert pairs(module(cache=False).train_dataloader()) == pairs(module().train_dataloader())
    assert len(list(cache.glob("*/"))) == 1


def _prepare(folder: str, results: Any) -> None:
    import os

    os.environ["AMT_CACHE"] = folder
    data = ChatDataModule(conversations(), tokenizer=tiny_tokenizer(), seq_len=256)
    data.prepare()
    results.put(data.rows["train"].fingerprint)


def test_two_processes_at_once_end_with_one_cache(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_prepare, args=(str(cache), results)) for _ in range(2)]
    for process in processes:
        process.start()
    prints = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    assert len(prints) == 1
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_failed_build_leaves_no_cache(cache: Path) -> None:
    key = cache_key("data", tiny_tokenizer(), {})

    def fail(scratch: Path) -> Dataset:
        (scratch / "half").write_text("written")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        load_or_build(key, fail)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert load_or_build(key, lambda scratch: Dataset.from_list([{"a": 1}])).to_list() == [{"a": 1}]


def test_the_first_batch_is_the_one_that_is_trained_first_and_takes_nothing_away() -> None:
    data = module(global_batch_size=4)
    shown = data.first_batch()
    steps = list(data.train_dataloader())
    assert [b["sample_ids"] for b in shown] == [b["sample_ids"] for b in steps[0]]
    assert sorted(sample_ids(steps)) == list(range(60))


def test_setup_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = module()
    rows = data.rows
    data.setup("fit")
    data.prepare()
    assert data.rows is rows


def test_it_is_built_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations(10)))
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MicroBatchDataModule, "data")
    arguments: dict[str, Any] = {
        "train": str(path),
        "seq_len": 256,
        "loss_on": "last_turn",
        "columns": {"messages": "messages"},
    }
    config = {"data": {"class_path": "automodel_trainer.data.ChatDataModule", "init_args": arguments}}
    parsed = parser.parse_string(yaml.safe_dump(config))
    data = parser.instantiate_classes(parsed).data
    assert isinstance(data, ChatDataModule)
    data.tokenizer = tiny_tokenizer()
    data.setup("fit")
    assert sorted(sample_ids(data.train_dataloader())) == list(range(10))
    arguments["overlong"] = "cut"
    with pytest.raises(jsonargparse.ArgumentError, match="overlong"):
        parser.parse_string(yaml.safe_dump(config))


def test_sample_prompts_are_of_the_validation_data() -> None:
    def rows(word: str) -> list[dict[str, str]]:
        return [{"prompt": f"{word} {i}", "completion": "yes"} for i in range(20)]

    data = ChatDataModule(rows("train"), rows("val"))
    assert data.sample_prompts(2) == ["val 0", "val 1"]
    assert ChatDataModule(rows("train")).sample_prompts(1) == ["train 0"]
    held_out = ChatDataModule(rows("train"), val_split=0.1, tokenizer=tiny_tokenizer(), seq_len=64)
    held_out.setup("fit")
    ids = [i for step in held_out.val_dataloader() for batch in step for i in batch["sample_ids"]]
    assert sorted(held_out.sample_prompts(2)) == sorted(f"train {i}" for i in ids)
