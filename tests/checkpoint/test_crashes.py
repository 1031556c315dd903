"""Processes that are killed, disks that fail, files that change: what was saved stays, what is damaged is named."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback

from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.checkpoint import check_checkpoint
from automodel_trainer.checkpoint.record import RecordedFile
from tests.callbacks.runs import train, written
from tests.checkpoint.crash_trials import trials
from tests.pool import RankPool
from tests.processes import call

KILLS = int(os.environ.get("AMT_KILLS", "4"))  # 100 in `make test-matrix`


def crash_trials(folder: Path, kills: int) -> None:
    (folder.parent / "report.json").write_text(json.dumps(trials(folder, kills, seed=0)))


def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """One of two ranks or both, many inside a save, sync and async; then started again with ckpt_path="last"."""
    call(tmp_path, crash_trials, tmp_path / "trials", KILLS, timeout=20 * KILLS + 60)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["problems"] == []
    assert report["kills"] == KILLS
    assert report["inside_a_save"] > KILLS / 3
    assert 0 < report["one_rank"] < KILLS
    assert report["finished"] >= 1


class Disk(Callback):
    """Breaks the disk at the end of one step, before it is saved, and mends it at the end of the next."""

    def __init__(self, step: int, breaking: Callable[[], Callable[[], None]]) -> None:
        self.step, self.breaking, self.mend = step, breaking, None

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.mend is not None:
            self.mend()
            self.mend = None
        if trainer.global_step == self.step:
            self.mend = self.breaking()


def no_room() -> Callable[[], None]:
    """No file may grow beyond 4096 bytes: what the kernel says then (EFBIG) comes where a full disk's ENOSPC would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def read_only(root: Path) -> Callable[[], None]:
    run = root / "checkpoints"
    mode = run.stat().st_mode
    run.chmod(0o555)
    if os.geteuid() != 0:
        return lambda: run.chmod(mode)
    os.seteuid(65534)  # permissions mean nothing to root

    def mend() -> None:
        os.seteuid(0)
        run.chmod(mode)

    return mend


def vanished(root: Path) -> Callable[[], None]:
    shutil.rmtree(root / "checkpoints")
    return lambda: None


def vanishing(root: Path) -> Callable[[], None]:
    """The folder goes while its files are being written."""
    patch, write = pytest.MonkeyPatch(), RecordedFile.close

    def closing(file: RecordedFile) -> None:
        write(file)
        shutil.rmtree(root / "checkpoints", ignore_errors=True)

    patch.setattr(RecordedFile, "close", closing)
    return patch.undo


BROKEN: dict[str, tuple[Callable[..., Callable[[], None]], str, list[int]]] = {
    "full": (lambda root: no_room(), "File too large", [2, 6, 8]),
    "read-only": (read_only, "Permission denied", [2, 6, 8]),
    "vanished": (vanished, "", [4, 6, 8]),
    "vanishing": (vanishing, "No such file or directory", [6, 8]),
}


def train_on(root: Path, kind: str, background: bool) -> tuple[list[Any], list[str], int]:
    breaking, _, _ = BROKEN[kind]
    callback = DCPCheckpoint(every_n_steps=2, keep_last=None, async_save=background)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        disk = Disk(4, partial(breaking, root))
        options: dict[str, Any] = {"max_steps": 8, "max_epochs": None, "limit_val_batches": 0}
        try:
            result = train(root, [Written(), disk, callback], **options)
        finally:
            if disk.mend is not None:
                disk.mend()
    return result["journal"], [str(w.message) for w in warned], callback.failed_saves


class Written(Callback):
    """Lets a save in the background get to the disk while it is as it is."""

    def on_train_batch_start(self, *args: Any) -> None:
        written()


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_run_survives_its_disk_and_says_so(pool: RankPool, kind: str, background: bool) -> None:
    """In a process of the pool: the limits are the process's. Not below pytest's folder, which is its user's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        survive(pool, Path(folder), kind, background)


def survive(pool: RankPool, tmp_path: Path, kind: str, background: bool) -> None:
    _, text, saved = BROKEN[kind]
    ((journal, warned, failed),) = pool.run(1, train_on, tmp_path, kind, background)
    assert [entry[1] for entry in journal] == list(range(1, 9))
    steps = [int(path.name[5:]) for path in sorted((tmp_path / "checkpoints").glob("step-*"))]
    assert steps == saved
    assert not list((tmp_path / "checkpoints").glob("*.tmp*"))
    for step in steps:
        check_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}")
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step-00000008"
    assert failed == (1 if text else 0)
    reported = [line for line in warned if "The checkpoint of step 4 could not be written" in line and text in line]
    assert len(reported) == failed, warned


def test_files_are_on_the_disk_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut leaves is what was flushed: every file, then every folder, then the name, then the link."""
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        events.append("fsync " + os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append(f"rename {path} {target}")
        return (replace if path.is_symlink() else rename)(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", renamed)
    train(tmp_path, [DCPCheckpoint(every_n_steps=1)], max_steps=1, max_epochs=None, limit_val_batches=0)
    run = tmp_path / "checkpoints"
    written, final = run / "step-00000001.tmp", run / "step-00000001"
    named = events.index(f"rename {written} {final}")
    paths = list(final.rglob("*"))
    for path in (*paths, final):
        flushed = f"fsync {written}" if path == final else f"fsync {written / path.relative_to(final)}"
        assert flushed in events[:named], path
    folders = max(events.index(f"fsync {written / part}") for part in ("model", "optimizer"))
    assert max(events.index(f"fsync {written / p.relative_to(final)}") for p in paths if p.is_file()) < folders
    linked = [f"rename {run / 'latest.tmp'} {run / 'latest'}", f"fsync {run}"]
    assert events[named + 1 : named + 4] == [f"fsync {run}", *linked]
