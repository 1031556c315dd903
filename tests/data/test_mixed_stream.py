"""Mixtures of streams: shares in tokens, every document once an epoch, exact resume on any layout, what is said."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from automodel_trainer import CausalLMModule, TextDataModule, Trainer
from automodel_trainer.data.stream import StreamLoader
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
SIZES = {"long": 40, "short": 10, "mid": 25}


def texts(name: str) -> list[str]:
    draw = np.random.default_rng(SIZES[name])
    return [f"{name} {i} " + "word " * int(draw.integers(0, 9)) for i in range(SIZES[name])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources in three formats."""
    folder = tmp_path_factory.mktemp("sources")
    rows = {name: [{"text": text} for text in texts(name)] for name in SIZES}
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows["long"]))
    Dataset.from_list(rows["short"]).to_parquet(folder / "short.parquet")
    (folder / "mid").mkdir()
    (folder / "mid" / "a.json").write_text(json.dumps(rows["mid"]))
    return folder


def sources(folder: Path, weights: tuple[Any, ...] = (1, 4, 4), **more: Any) -> list[dict[str, Any]]:
    paths = (folder / "long.jsonl", folder / "short.parquet", folder / "mid")
    return [{"path": str(path), "weight": weight, **more} for path, weight in zip(paths, weights)]


def loader(train: Any, dp_rank: int = 0, dp_size: int = 1, **options: Any) -> StreamLoader:
    options = {"seq_len": 32, "global_batch_size": 8, "shuffle_buffer": 7, "seed": 3, **options}
    data = TextDataModule(train, tokenizer=TOKENIZER, streaming=True, **options)
    data.setup("fit")
    strategy = SimpleNamespace(dp_rank=dp_rank, dp_size=dp_size)
    data.trainer = SimpleNamespace(strategy=strategy, max_steps=30)  # type: ignore[assignment]
    made = data.train_dataloader()
    assert isinstance(made, StreamLoader)
    return made


def rows_of(steps: Any) -> list[tuple[int, tuple[int, ...]]]:
    return [
        (int(source), tuple(row))
        for step in steps
        for batch in step
        for source, row in zip(batch["sources"], batch["input_ids"].tolist(), strict=True)
    ]


@pytest.mark.parametrize(("temperature", "shares"), [(1.0, [1 / 9, 4 / 9, 4 / 9]), (2.0, [0.2, 0.4, 0.4])])
def test_shares_are_of_tokens_from_the_first_rows_on(folder: Path, temperature: float, shares: list[float]) -> None:
    rows = rows_of(loader(sources(folder), temperature=temperature))
    for count in (9, 40, len(rows)):
        taken = Counter(source for source, _ in rows[:count])
        assert all(abs(taken[number] - share * count) <= 1 for number, share in enumerate(shares))


def test_each_source_is_the_stream_that_it_is_alone(folder: Path) -> None:
    """So every document of a source is read once before any is read twice."""
    mixed = rows_of(loader(sources(folder)))
    for number, source in enumerate(sources(folder)):
        own = [row for at, row in mixed if at == number][:30]
        alone = loader(source["path"], global_batch_size=1)
        assert own == [tuple(step[0]["input_ids"][0].tolist()) for step in islice(alone, len(own))]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_it_goes_on_exactly_on_another_layout(folder: Path, num_workers: int) -> None:
    reference = [Counter(rows_of([step])) for step in loader(sources(folder))]
    interrupted = loader(sources(folder), num_workers=num_workers)
    assert [Counter(rows_of([step])) for step in islice(interrupted, 7)] == reference[:7]
    state = json.loads(json.dumps(interrupted.state_dict()))
    ranks = [loader(sources(folder), rank, 2, num_workers=num_workers, micro_batch_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    assert [Counter(rows_of(shares)) for shares in zip(*ranks, strict=True)] == reference[7:]
    with pytest.raises(ValueError, match="weights of a mixture"):
        loader(sources(folder, (1, 4, 5))).load_state_dict(state)


def test_what_cannot_be_streamed_is_refused(folder: Path) -> None:
    for given in (sources(folder, (None,) * 3), sources(folder, (None,) * 3, epochs=2)):
        with pytest.raises(ValueError, match=r"'long' is streamed, so nobody knows how many tokens.*'weight'"):
            TextDataModule(given, streaming=True)


def test_a_run_states_shares_epochs_and_losses(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that stops and one that goes on are the run that did not stop; what is left out is said."""

    def fit(root: Path, steps: int, weights: Any = (1, 4, 4), **more: Any) -> Trainer:
        given = sources(folder, weights)
        given[2]["path"] = Dataset.from_list([{"text": t} for t in [None, *texts("mid"), ""]]).to_iterable_dataset()
        given[2]["name"] = "mid"
        data = TextDataModule(given, streaming=True, seq_len=32, global_batch_size=8, shuffle_buffer=7)
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=steps, logger=False, log_every_n_steps=2,
            enable_progress_bar=False, default_root_dir=root,
        )  # fmt: skip
        module = CausalLMModule(tiny_model(), tokenizer=tiny_tokenizer(), lr=1e-3, scheduler="constant")
        trainer.fit(module, data, **more)
        return trainer

    with caplog.at_level("INFO"):
        whole = fit(tmp_path / "whole", 12)
    out = capsys.readouterr().out
    assert "short: 44.4% of the tokens, streamed" in " ".join(out.split())
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "short: the stream begins again: epoch 2" in said
    assert "mid: 1 row(s) so far have no text in column 'text'; such rows are left out" in said
    fit(tmp_path / "cut", 5)
    rest = fit(tmp_path / "cut", 12, ckpt_path="last")
    names = [f"train_loss/{name}" for name in ("long", "short", "mid")]
    for name in ("train_loss", *names):
        assert whole.callback_metrics[name] == rest.callback_metrics[name]
    with pytest.raises(ValueError, match=r"(?s)data\.stream .*'weight': 1.* → .*'weight': 2.*resume='data'"):
        fit(tmp_path / "cut", 14, weights=(2, 4, 4), ckpt_path="last")
    assert fit(tmp_path / "cut", 14, weights=(2, 4, 4), ckpt_path="last", resume="data").global_step == 14
