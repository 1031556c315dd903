"""Machines whose clocks are wrong by an hour: the newest checkpoint is the one that was written last."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.checkpoint import clock
from automodel_trainer.checkpoint.manifest import read_manifest
from automodel_trainer.checkpoint.remote import RemoteRuns
from tests.callbacks.runs import train

SHORT: dict[str, Any] = {"max_epochs": None, "limit_val_batches": 0, "scheduler": "constant"}
HOUR = 3600


class Machine:
    """A new process on a machine whose clock is wrong by so many seconds."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def __call__(self, wrong_by: float) -> None:
        self._patch.setattr(clock, "_clock", clock._Clock())
        self._patch.setattr(clock, "time", SimpleNamespace(time=lambda: time.time() + wrong_by))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def run(root: Path, until: int, place: str | None = None, **options: Any) -> None:
    train(root, [DCPCheckpoint(place, every_n_steps=2, keep_last=2)], max_steps=until, **SHORT, **options)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("step-*"))


def test_a_run_goes_on_where_it_is_an_hour_earlier(tmp_path: Path, machine: Machine) -> None:
    machine(HOUR)
    run(tmp_path, 4)
    machine(0)
    run(tmp_path, 8, ckpt_path="auto")
    assert names(tmp_path / "checkpoints") == ["step-00000006", "step-00000008"], "the two newest are kept"
    machine(-HOUR)
    run(tmp_path, 2)  # another run
    assert names(tmp_path / "checkpoints-v1") == ["step-00000002"]
    machine(-HOUR)
    assert DCPCheckpoint().find_last(tmp_path) == tmp_path / "checkpoints-v1" / "step-00000002"
    newest = read_manifest(tmp_path / "checkpoints-v1" / "step-00000002")["created"]
    assert newest - time.time() == pytest.approx(HOUR, abs=600), "just after the newest, and not the sum of both errors"


def test_a_new_machine_knows_only_the_store(tmp_path: Path, bucket: str, machine: Machine) -> None:
    machine(HOUR)
    run(tmp_path / "a", 2, f"{bucket}/run")
    machine(0)
    run(tmp_path / "b", 2, f"{bucket}/run")  # another run
    machine(-HOUR)
    assert RemoteRuns(f"{bucket}/run").newest()[0] == ("-v1", "step-00000002")


def test_a_time_that_is_none_is_not_remembered(machine: Machine) -> None:
    machine(0)
    clock.note(float("inf"))
    clock.note(float("nan"))
    first = clock.stamp()
    assert first == pytest.approx(time.time(), abs=600)
    assert clock.stamp() > first
