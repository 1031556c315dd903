"""Rows are encoded the same on any number of processes, forked or started anew; what stops one is said."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, List, Value

from automodel_trainer.data import encode_rows as encode_module
from automodel_trainer.data import in_processes
from automodel_trainer.data.encode_rows import encode_rows, processes_for

FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "trained": List(Value("bool")),
        "sample_id": Value("int64"),
        "text": Value("string"),
    }
)


def rows(count: int) -> Dataset:
    return Dataset.from_list([{"text": "x" * (i % 37)} for i in range(count)])


def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
    """As many tokens as characters. A row without characters makes no sample, and one of 36 makes two."""
    pairs = [(n, t) for n, t in zip(numbers, batch["text"]) for _ in range(min(len(t), 1) + (len(t) == 36))]
    return {
        "input_ids": [[n % 1000] * len(t) for n, t in pairs],
        "trained": [[i % 2 == 0 for i in range(len(t))] for _, t in pairs],
        "sample_id": [n for n, _ in pairs],
        "text": [t for _, t in pairs],
    }


def test_samples_do_not_depend_on_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows(2_345)
    made = encode(data[:], list(range(len(data))))
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    for processes, folder in ((1, None), (1, tmp_path), (3, None), (2, tmp_path)):
        samples = encode_rows(data, encode, FEATURES, folder, processes)
        assert samples.features == FEATURES
        assert samples[:] == made
        for file in tmp_path.glob("*"):
            file.unlink()
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def scaled(factor: int, item: int) -> tuple[int, str | None]:
    return factor * item, os.environ.get("TOKENIZERS_PARALLELISM")


@pytest.mark.parametrize("forks", [True, False])
def test_items_keep_their_order_and_are_read_when_needed(forks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_processes, "FORKS", forks)
    read: list[int] = []
    items = (read.append(i) or i for i in range(50))  # type: ignore[func-returns-value]
    results = in_processes.in_processes(scaled, 3, items, processes=2)
    assert next(results) == (0, "false")
    assert len(read) <= 2 * in_processes.AHEAD
    assert [value for value, _ in results] == [3 * i for i in range(1, 50)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_refused_row_stops_all(processes: int) -> None:
    def refuse(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        if 300 in numbers:
            raise ValueError("row 300 is odd")
        return encode(batch, numbers)

    with pytest.raises(ValueError, match="row 300 is odd"):
        encode_rows(rows(2_000), refuse, FEATURES, None, processes)


def test_a_process_that_is_ended_is_named() -> None:
    """As the kernel does where memory runs out. A pool would wait for the lost part for ever."""

    def end(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        if 300 in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(batch, numbers)

    with pytest.raises(ValueError, match="was ended, most often because memory ran out"):
        encode_rows(rows(2_000), end, FEATURES, None, 2)


def test_few_rows_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert [processes_for(count) for count in (1, 1_999, 2_000, 16_000, 10**6)] == [1, 1, 2, 16, 16]
    monkeypatch.setattr(encode_module, "FORKS", False)
    assert processes_for(10**6) == 1
