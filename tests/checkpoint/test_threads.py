"""Several threads of one process save, replace and remove checkpoints beside each other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from automodel_trainer.checkpoint.folder import prepare, publish, remove_checkpoint
from automodel_trainer.checkpoint.manifest import read_manifest


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Threads change at almost every line."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def save(folder: Path, content: str) -> None:
    target = prepare(folder)
    (target / "weights").write_text(content)
    publish(target, folder, {})


def replaced(folder: Path) -> None:
    for turn in range(20):
        save(folder, str(turn))


def saved_and_removed(folder: Path) -> None:
    for turn in range(20):
        save(folder, str(turn))
        remove_checkpoint(folder)
    save(folder, "19")


def test_no_save_takes_another_for_a_remainder(tmp_path: Path) -> None:
    work: list[Callable[[Path], None]] = [replaced, saved_and_removed] * 3
    folders = [tmp_path / f"step-{number}" for number in range(len(work))]
    with ThreadPoolExecutor(len(work)) as threads:
        for done in [threads.submit(function, folder) for function, folder in zip(work, folders, strict=True)]:
            done.result()
    assert sorted(tmp_path.iterdir()) == folders
    for folder in folders:
        assert (folder / "weights").read_text() == "19"
        assert read_manifest(folder)["files"]["weights"]["size"] == 2
