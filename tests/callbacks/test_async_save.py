"""Saving in the background: the same checkpoint as a save that is waited for, one at a time, and what goes wrong."""

from __future__ import annotations

import errno
import json
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from automodel_trainer.callbacks import dcp_checkpoint
from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.checkpoint import CheckpointError, check_checkpoint, state
from automodel_trainer.checkpoint.background import BackgroundSaver
from automodel_trainer.checkpoint.manifest import read_manifest
from automodel_trainer.checkpoint.record import RecordedFile
from automodel_trainer.checkpoint.state import RUN_KEY
from tests.callbacks.runs import train, written
from tests.matrix import more
from tests.pool import RankPool


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(run: Path) -> dict[str, Any]:
    """Of every checkpoint: what is in its files, but for the callback's own path, options and times."""
    found: dict[str, Any] = {}
    for checkpoint in sorted(run.glob("step-*")):
        check_checkpoint(checkpoint)
        for name, entry in read_manifest(checkpoint)["files"].items():
            found[f"{checkpoint.name}/{name}"] = entry
        trainer = json.loads((checkpoint / "trainer.json").read_text())
        trainer["lightning"]["callbacks"] = None
        settings = trainer["lightning"][RUN_KEY]["settings"]
        for own in ("trainer.default_root_dir", "trainer.callbacks.DCPCheckpoint.async_save"):
            settings.pop(own)
        found[f"{checkpoint.name}/trainer.json"] = trainer
    return found


def slow_disk(seconds: float) -> pytest.MonkeyPatch:
    patch, close = pytest.MonkeyPatch(), RecordedFile.close

    def closing(self: RecordedFile) -> None:
        time.sleep(seconds)
        close(self)

    patch.setattr(RecordedFile, "close", closing)
    return patch


def both_ways(root: Path, devices: int, strategy: str) -> bool:
    """Train with sync saves and with async saves onto a disk that is slower than a step."""
    layout = {"devices": devices, "strategy": strategy, "max_steps": 4, "max_epochs": None}
    options: dict[str, Any] = {"every_n_steps": 1, "keep_last": None}
    train(root / "sync", [DCPCheckpoint(**options)], **layout)
    patch = slow_disk(0.03)
    try:
        train(root / "async", [DCPCheckpoint(**options, async_save=True)], **layout)
    finally:
        patch.undo()
    sync, background = contents(root / "sync" / "checkpoints"), contents(root / "async" / "checkpoints")
    assert len(sync) > 4 * 4
    return sync == background


@pytest.mark.parametrize(("devices", "strategy"), [(1, "auto"), (2, "ddp"), (2, "fsdp2"), more(4, "hsdp")])
def test_what_is_written_is_the_moment_of_the_save(pool: RankPool, tmp_path: Path, devices: int, strategy: str) -> None:
    """Weights, optimizer, loops, random numbers (dropout is on): training has gone on when they are written."""
    assert all(pool.run(devices, both_ways, tmp_path, devices, strategy))


class Steps(Callback):
    """Lets the disk go on only when training has gone on: a save that blocked training would wait for itself."""

    def __init__(self, release_after: int) -> None:
        self.release_after, self.released = release_after, threading.Event()
        self.writing: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.writing.append(sum(thread.name == "checkpoint" for thread in threading.enumerate()))
        if trainer.global_step == self.release_after:
            self.released.set()


def test_training_goes_on_while_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, publish = Steps(release_after=4), state.publish
    links: list[bool] = []

    def held(*args: Any) -> None:
        assert steps.released.wait(30), "training waited for the disk"
        links.append((tmp_path / "checkpoints" / "latest").exists())
        publish(*args)

    monkeypatch.setattr(state, "publish", held)
    callback = DCPCheckpoint(every_n_steps=2, keep_last=1, async_save=True)
    # The callback that releases runs before the one that saves: step 4 is over when the save of step 4 begins.
    train(tmp_path, [steps, callback], max_steps=5, max_epochs=None)
    assert max(steps.writing) == 1
    assert links[0] is False, "`latest` moves after the checkpoint is whole"
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000005"]
    assert callback.last_model_path == str(tmp_path / "checkpoints" / "step-00000005")
    assert callback.failed_saves == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


class FullDisk(Callback):
    def __init__(self, steps: set[int]) -> None:
        self.steps, self.patch = steps, pytest.MonkeyPatch()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        last = trainer.global_rank == trainer.world_size - 1

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        written()  # the save before
        self.patch.undo()
        if trainer.global_step in self.steps and last:
            self.patch.setattr(RecordedFile, "write", fail)


def with_full_disk(root: Path, devices: int) -> tuple[int, list[str], str]:
    callback = DCPCheckpoint(every_n_steps=2, keep_last=None, async_save=True, monitor="val_loss", mode="max")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        strategy = "fsdp2" if devices > 1 else "auto"
        train(root, [FullDisk({4, 6}), callback], devices=devices, strategy=strategy, val_check_interval=2)
    assert {"step-00000004", "step-00000006"}.isdisjoint(callback.scores)
    return callback.failed_saves, names(root / "checkpoints"), "\n".join(str(w.message) for w in warned)


@pytest.mark.parametrize("devices", [1, 2])
def test_full_disk_is_reported_and_training_goes_on(pool: RankPool, tmp_path: Path, devices: int) -> None:
    for rank, (failed, left, warned) in enumerate(pool.run(devices, with_full_disk, tmp_path, devices)):
        assert failed == 2
        assert {"step-00000002", "step-00000008", "step-00000010"} <= set(left)
        assert {"step-00000004", "step-00000006"}.isdisjoint(left)
        if rank == 0:
            assert "The checkpoint of step 4 could not be written" in warned
            assert "the latest checkpoint is still" in warned
            assert "2 checkpoint(s) of this run could not be written" in warned


class Crash(Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("crashed")


def test_a_crash_waits_for_the_save_in_flight(tmp_path: Path) -> None:
    patch = slow_disk(0.1)
    try:
        with pytest.raises(RuntimeError, match="crashed"):
            train(tmp_path, [Crash(), DCPCheckpoint(every_n_steps=2, async_save=True)])
    finally:
        patch.undo()
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000002"]
    check_checkpoint(tmp_path / "checkpoints" / "latest")


def test_a_save_in_flight_is_left_alone_by_another_into_the_same_folder(tmp_path: Path) -> None:
    saver, module = BackgroundSaver(), torch.nn.Linear(3, 3)
    lightning: dict[str, Any] = {"global_step": 1, "loops": {}}
    patch = slow_disk(0.1)
    try:
        saver.save(tmp_path / "step-1", lightning, module, [])
        state.save_checkpoint(tmp_path / "step-2", lightning, module, [])
        saver.wait()
    finally:
        patch.undo()
    for name in ("step-1", "step-2"):
        check_checkpoint(tmp_path / name)
    assert names(tmp_path) == ["step-1", "step-2"]


@pytest.mark.parametrize("background", [False, True])
def test_a_slow_disk_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, background: bool
) -> None:
    monkeypatch.setattr(dcp_checkpoint, "SLOW", 0.3)
    patch = slow_disk(0.1)
    try:
        callback = DCPCheckpoint(every_n_steps=1, async_save=background)
        train(tmp_path, [callback], max_steps=4, max_epochs=None, limit_val_batches=0)
    finally:
        patch.undo()
    reported = [str(w.message) for w in recwarn if "Training waited" in str(w.message)]
    assert len(reported) == 1
    assert ("async_save" in reported[0]) is not background
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000002", "step-00000003", "step-00000004"]


def test_buffers_are_taken_once(tmp_path: Path) -> None:
    saver, module = BackgroundSaver(), torch.nn.Linear(3, 3)
    addresses = []
    for step in range(3):
        with torch.no_grad():
            module.weight.fill_(step)
        saver.save(tmp_path / f"step-{step}", {"loops": {}}, module, [])
        addresses.append(saver.buffers.copy("weights/weight", module.weight).data_ptr())
        saver.wait()
    assert len(set(addresses)) == 1
    assert saver.buffers.nbytes == 12 * 4


def test_what_fails_in_the_thread_is_raised_by_whoever_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    saver = BackgroundSaver()
    monkeypatch.setattr(state, "publish", die)
    saver.save(tmp_path / "a", {"loops": {}}, torch.nn.Linear(1, 1), [])
    with pytest.raises(CheckpointError, match="Connection closed by peer"):
        saver.wait()
    assert saver.wait()
