"""What the Trainer costs the host in a step, counted in function calls: time would depend on what else runs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.processes import call

FILE = Path(__file__).parents[1] / "benchmarks" / "trainer_overhead.py"


@pytest.fixture
def benchmark() -> Iterator[Any]:
    with loaded() as module:
        yield module


@contextmanager
def loaded() -> Iterator[Any]:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("trainer_overhead", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@contextmanager
def counted() -> Iterator[list[int]]:
    """The number of function calls so far, Python's and C's."""
    calls = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        calls[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def overhead(benchmark: Any, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """Function calls of a Trainer's step, less those of a bare step."""
    options = argparse.Namespace(
        shape="test", lora=False, rows=2, strategy="auto", precision="fp32", accelerator="cpu", defaults=False
    )
    clock = benchmark.Interleave(benchmark.batch_of("test", 2), span=10, rounds=3, warmup=10)
    with counted() as calls:
        monkeypatch.setattr(benchmark, "now", lambda: calls[0])
        getattr(benchmark, kind)(options, clock, str(folder))
    assert len(clock.trainer) == len(clock.bare) == 3
    assert min(clock.bare) > 500
    return statistics.median(clock.trainer) - statistics.median(clock.bare)


def both(folder: Path) -> None:
    with loaded() as module, pytest.MonkeyPatch.context() as patch:
        found = [overhead(module, kind, folder, patch) for kind in ("ours", "lightning")]
    (folder / "calls.json").write_text(json.dumps(found))


def test_no_more_host_work_than_lightning_s_own_trainer(tmp_path: Path) -> None:
    """In a process of its own: what other tests leave behind, such as filters of warnings, is called too."""
    call(tmp_path, both, tmp_path)
    ours, lightning = json.loads((tmp_path / "calls.json").read_text())
    assert 0 < ours <= lightning


def test_command_line(benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--span", "2", "--rounds", "2", "--runs", "1", "--json", "--lora"])
    benchmark.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() == {"ours"}
    values = found["ours"]
    assert values["ratio"] > 0
    assert values["trainer_ms"] > 0
