"""Garbage is collected when it is said to be, and Python has its collector back after the run, however it ends."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from automodel_trainer.callbacks import GarbageCollection
from automodel_trainer.modules import CausalLMModule
from automodel_trainer.trainer import Trainer
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def _nothing_frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a user's process: ours has frozen what it imported (tests/conftest.py)."""
    gc.unfreeze()
    monkeypatch.setattr(GarbageCollection, "_frozen_by_user", False)
    yield
    gc.freeze()


class Cycle:
    def __init__(self) -> None:
        self.itself = self


class Watch(Callback):
    """Leaves a cycle behind in every step, and notes which of them are still there, and how it stands."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.cycles: list[weakref.ref[Cycle]] = []
        self.alive: list[int] = []
        self.enabled: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.enabled.append(gc.isenabled())
        self.alive.append(sum(cycle() is not None for cycle in self.cycles))
        self.cycles.append(weakref.ref(Cycle()))
        if self.fail_at == trainer.global_step:
            raise RuntimeError("stopped")


def fit(folder: Path, collection: GarbageCollection, watch: Watch, steps: int = 6) -> Trainer:
    ids = torch.randint(1, 200, (2, 8))
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        max_steps=steps, default_root_dir=folder, callbacks=[collection, watch],
    )  # fmt: skip
    trainer.fit(CausalLMModule(tiny_model()), [[{"input_ids": ids, "labels": ids.clone()}]] * steps)
    return trainer


def in_ledger(folder: Path) -> int:
    return json.loads((folder / "ledger.json").read_text())["run"]["garbage_collection"]


def test_every_few_steps_and_only_then(tmp_path: Path) -> None:
    frozen, watch = gc.get_freeze_count(), Watch()
    fit(tmp_path, GarbageCollection(every_n_steps=3), watch)
    assert watch.enabled == [True] + 5 * [False]
    first = watch.alive[1]  # Python may have freed it before
    assert watch.alive[2:] == [first + 1, first, first + 1, first + 2]
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
    assert in_ledger(tmp_path) == 3


def test_python_has_it_back_after_an_error(tmp_path: Path) -> None:
    assert gc.get_freeze_count() == 0
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path, GarbageCollection(), Watch(fail_at=3))
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_the_user_has_frozen_stays_frozen(tmp_path: Path) -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with pytest.MonkeyPatch.context() as patch:
        for run in ("first", "second"):
            fit(tmp_path / run, GarbageCollection(), Watch(), steps=2)
            patch.setattr(gc, "get_freeze_count", lambda: pytest.fail("counted in every run"))
    assert 0.9 * frozen < gc.get_freeze_count() <= frozen  # some may have been let go of


def test_zero_leaves_it_to_python(tmp_path: Path) -> None:
    watch = Watch()
    trainer = fit(tmp_path, GarbageCollection(every_n_steps=0), watch, steps=3)
    assert watch.enabled == 3 * [True]
    assert sum(isinstance(c, GarbageCollection) for c in trainer.callbacks) == 1  # the default one stays out


def test_who_has_switched_it_off_is_left_alone(tmp_path: Path) -> None:
    gc.disable()
    try:
        fit(tmp_path, GarbageCollection(every_n_steps=1), Watch(), steps=2)
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert in_ledger(tmp_path) == 0


def test_a_number_that_means_nothing() -> None:
    with pytest.raises(ValueError, match="every_n_steps=-1"):
        GarbageCollection(every_n_steps=-1)
