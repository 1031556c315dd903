"""Mixtures: shares in tokens, every row of a source once before any twice, exact resume, validation by name."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from automodel_trainer import CausalLMModule, ChatDataModule, TextDataModule, TokenDataModule, Trainer
from automodel_trainer.data.loader import MicroBatchLoader
from automodel_trainer.data.mixture import MixtureRows, Source, parse_sources
from automodel_trainer.data.rows import RandomRows
from tests.tiny import tiny_model, tiny_tokenizer


def mixture(weights: list[float | None], sizes: tuple[int, ...] = (30, 10, 60), **options: Any) -> MixtureRows:
    epochs = options.pop("epochs", [None] * len(sizes))
    sources = [Source("", weight, times, f"s{i}") for i, (weight, times) in enumerate(zip(weights, epochs))]
    rows = [RandomRows(size, 16, 250, seed=i) for i, size in enumerate(sizes)]
    return MixtureRows(sources, rows, options.get("temperature", 1.0), seed=3)


def shares(rows: MixtureRows) -> list[float]:
    return [share for share, _ in rows.shares.values()]


def test_shares_are_of_tokens() -> None:
    assert shares(mixture([None] * 3)) == pytest.approx([0.3, 0.1, 0.6])
    assert shares(mixture([1, 1, 2])) == pytest.approx([0.25, 0.25, 0.5])
    assert shares(mixture([1, 4, 4], temperature=2)) == pytest.approx([0.2, 0.4, 0.4])
    assert list(mixture([None] * 3, epochs=[2, 0.5, 1]).counts) == [60, 5, 60]
    assert len(mixture([1, 1, 2])) == 100, "an epoch stays as long"
    assert "2.5 epochs in one of the mixture, upsampled" in mixture([1, 1, 2]).describe_shares()[1]
    assert "⚠ each row 6.0 times" in mixture([2, 3, 5], (90, 5, 5)).describe_shares()[1]


@pytest.mark.parametrize("packed", [True, False])
def test_every_row_of_a_source_once_before_any_twice(packed: bool) -> None:
    rows = mixture([1, 1, 2])
    loader = MicroBatchLoader(rows, micro_batch_size=1, global_batch_size=7, packed=packed)
    seen: list[Counter[int]] = [Counter(), Counter(), Counter()]
    tokens = [{part.fetch([i])[0][0].input_ids.tobytes(): i for i in range(len(part))} for part in rows.rows]
    for _ in range(4):
        for step in loader:
            for batch in step:
                text = batch["input_ids"][0].numpy().tobytes()
                if batch["sample_ids"]:
                    source = next(number for number, known in enumerate(tokens) if text in known)
                    seen[source][tokens[source][text]] += 1
        for counter, part in zip(seen, rows.rows):
            often = [counter[i] for i in range(len(part))]
            assert max(often) - min(often) <= 1
    assert [sum(counter.values()) for counter in seen] == [100, 100, 200]


def test_it_resumes_exactly_and_travels_to_workers() -> None:
    def loader() -> MicroBatchLoader:
        return MicroBatchLoader(pickle.loads(pickle.dumps(mixture([1, 1, 2]))), micro_batch_size=1, global_batch_size=7)

    whole = loader()
    steps = [[b["input_ids"] for b in step] for _ in range(2) for step in whole]
    first = loader()
    for _ in first:
        pass
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    rest = loader()
    rest.load_state_dict(copy.deepcopy(first.state_dict()))
    found = [[b["input_ids"] for b in step] for step in rest]
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(found, steps[len(first) + 3 :], strict=True))


def test_what_makes_no_mixture_is_refused() -> None:
    a, b = {"path": "a.jsonl"}, {"path": "b/a.jsonl"}
    for train, message in (
        ([{**a, "wait": 2}, b], "no 'wait'. Allowed: path, weight"),
        ([{**a, "weight": 0}, b], "must be positive"),
        ([{**a, "weight": float("inf")}, b], "must be positive and finite"),
        ([{**a, "weight": "1"}, b], "weight='1' of .* is a str and must be a number"),
        ([{**a, "epochs": True}, b], "is a bool and must be a number"),
        ([{**a, "weight": 1}, {**b, "name": "b"}], "some sources have 'weight'"),
        ([a, b], "two sources are called 'a'"),
        ([{**a, "weight": 1, "epochs": 1}], "both 'weight' and 'epochs'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_sources(train)
    assert parse_sources([{"messages": [], "path": "x"}]) is None
    with pytest.raises(ValueError, match="temperature=0 must be positive"):
        ChatDataModule([a], temperature=0)
    with pytest.raises(ValueError, match="'a' is streamed, so nobody knows how many tokens"):
        TextDataModule([a], streaming=True)


def chats(word: str, count: int) -> list[dict[str, Any]]:
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": word}]
    return [{"messages": turn}] * count


def test_a_run_trains_on_it_and_names_the_validation_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = [{"path": chats("aa", 12), "weight": 1, "name": "a"}, {"path": chats("bb", 4), "weight": 1, "name": "b"}]
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=tmp_path, logger=False)
    data = ChatDataModule(train, tokenizer=tiny_tokenizer(), seq_len=64, packing=False, val_split=0.25)
    trainer.fit(CausalLMModule(tiny_model(), tokenizer=tiny_tokenizer()), data)
    assert {"val_loss/a", "val_loss/b"} <= trainer.callback_metrics.keys()
    assert "b: 50.0% of the tokens, 6 of 3 rows, 2 epochs in one of the mixture, upsampled" in capsys.readouterr().out
    texts = [{"path": [{"text": word * 20}] * 3, "name": word} for word in ("x", "y")]
    text = TextDataModule(texts, {"one": [{"text": "z" * 30}]}, tokenizer=tiny_tokenizer(), seq_len=16)
    text.setup("fit")
    assert list(text.val_dataloader()) == ["one"]
    assert shares(text.rows["train"]) == pytest.approx([0.5, 0.5])  # type: ignore[arg-type]


def test_messages_name_the_source() -> None:
    """What was left out of a source, and what is wrong with one, is said with its name."""
    tokenizer = tiny_tokenizer()
    good = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}] * 8
    silent = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}]
    long = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a" * 400}]}]

    def said(cls: Any, parts: dict[str, Any], **options: Any) -> str:
        train = [{"path": Dataset.from_list(rows), "name": name} for name, rows in parts.items()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cls(train, tokenizer=tokenizer, cache=False, **options).prepare()
        return " ".join(str(warning.message) for warning in caught)

    chats = said(ChatDataModule, {"plain": good, "mixed": good + silent + long}, seq_len=128)
    assert "train/mixed: 1 of 10 samples are longer than seq_len=128" in chats
    assert "mixed: 1 conversations have a turn without content" in chats
    assert "train/plain" not in chats
    texts = {"full": [{"text": "words"}] * 3, "gaps": [{"text": "words"}, {"text": ""}, {"text": None}]}
    assert "train/gaps: left out 2 of 3 rows without text" in said(TextDataModule, texts, seq_len=16)
    bad = [{"path": Dataset.from_list(good), "name": "plain"}, {"path": [{"messages": [{"role": "x"}]}], "name": "odd"}]
    with pytest.raises(ValueError, match=r"^train/odd: row 0 of the data"):
        ChatDataModule(bad, tokenizer=tokenizer, cache=False).prepare()


def test_validation_sets_have_names_without_a_mixture(tmp_path: Path) -> None:
    """Of every data module; a single one too. A `DatasetDict` holds splits, not sets."""
    tokenizer = tiny_tokenizer()
    np.arange(5, 15, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    text = [{"text": "z" * 30}]
    common: dict[str, Any] = {"tokenizer": tokenizer, "seq_len": 64}
    modules = {
        "chat": ChatDataModule(chats("aa", 2), {"a": chats("bb", 2), "b": chats("cc", 1)}, **common),
        "text": TextDataModule(text, {"a": text, "b": text}, **common),
        "tokens": TokenDataModule(tmp_path / "tokens.bin", dict.fromkeys("ab", tmp_path / "tokens.bin"), **common),
        "alone": TextDataModule(text, {"a": text}, **common),
        "splits": ChatDataModule(chats("aa", 2), DatasetDict(validation=Dataset.from_list(chats("bb", 2))), **common),
    }
    module = CausalLMModule(tiny_model(), tokenizer=tokenizer)
    trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    for name, data in modules.items():
        found = trainer.validate(module, data, verbose=False)[0]
        names = {key.partition("/")[2] for key in found if key.startswith("val_loss/")}
        assert names == {"alone": {"a"}, "splits": set()}.get(name, {"a", "b"}), name
