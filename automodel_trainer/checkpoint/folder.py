"""Write a checkpoint's folder atomically: under a temporary name, with a manifest, and renamed at the end."""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from automodel_trainer.checkpoint.manifest import MANIFEST, write_manifest
from automodel_trainer.checkpoint.record import Entry, entry_of, sync

TEMPORARY = ".tmp"  # step-00000010.tmp is being written; step-00000010.tmp-old is being replaced
_OLD = "-old"
_IN_WORK: set[Path] = set()  # temporary folders that this process writes or removes, possibly in the background
_LOCK = threading.Lock()  # held while remains are looked for, and while a folder of `_IN_WORK` comes to be
_SILENT = 3600.0  # seconds after which a folder of another job that nobody has written to is taken for a remainder


class _Neighbours:
    """Whether other jobs write checkpoints of the same run beside this one: replica groups that take turns."""

    present = False


neighbours = _Neighbours()


def temporary(folder: Path) -> Path:
    """The temporary name of `folder`. It is the same on every rank without communication."""
    return folder.with_name(folder.name + TEMPORARY)


def prepare(folder: Path) -> Path:
    """Remove the remains of crashed saves and removals beside `folder`, and create its temporary folder.

    If the process died while it replaced a checkpoint, the old checkpoint gets its name back.

    Returns:
        The temporary folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    target = temporary(folder)
    assert target not in _IN_WORK, "one save of a folder at a time"
    with _LOCK:
        _clear(target)
        _IN_WORK.add(target)
        target.mkdir()
        now = target.stat().st_mtime  # by the clock of the disk
        for leftover in folder.parent.glob(f"*{TEMPORARY}*"):
            if leftover != target and not (neighbours.present and now - _last_write(leftover) < _SILENT):
                _clear(leftover)
    return target


@contextmanager
def _renamed(folder: Path, gone: Path) -> Iterator[None]:
    """Rename `folder` to `gone`, and remove it at the end. No save of this process takes it for a remainder."""
    try:
        with _LOCK:
            _IN_WORK.add(gone)
            folder.rename(gone)
        yield
        shutil.rmtree(gone)
    finally:
        _IN_WORK.discard(gone)


def _clear(leftover: Path) -> None:
    """Remove a temporary folder that nobody writes any more."""
    if leftover in _IN_WORK or not leftover.is_dir() or leftover.is_symlink():
        return
    replaced = leftover.with_name(leftover.name.removesuffix(TEMPORARY + _OLD))
    if leftover.name.endswith(TEMPORARY + _OLD) and not replaced.exists():
        leftover.rename(replaced)
    else:
        shutil.rmtree(leftover, ignore_errors=neighbours.present)  # which may be removing it too


def _last_write(folder: Path) -> float:
    """When something in a folder was last written; in the far past if it is gone."""
    latest = -math.inf
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):
            latest = max(latest, path.stat().st_mtime)
    return latest


def abandon(target: Path) -> None:
    """Remove a temporary folder that will not become a checkpoint. Errors are ignored."""
    _IN_WORK.discard(target)
    shutil.rmtree(target, ignore_errors=True)


def publish(target: Path, folder: Path, written: Mapping[str, Entry], elsewhere: Collection[str] = ()) -> None:
    """Write the manifest of `target`, flush everything to disk, and rename `target` to `folder`.

    Args:
        target: the temporary folder.
        folder: its final name.
        written: maps paths in `target` to entries, from the ranks that wrote and flushed the files. Other files in
            `target` are read and flushed here.
        elsewhere: those of them that lie on the disks of other nodes.

    Raises:
        OSError: a file is missing, or its size is not what was written.
    """
    entries = dict(written)
    for file in sorted(file for file in target.rglob("*") if file.is_file()):
        name = file.relative_to(target).as_posix()
        if name not in entries:
            entries[name] = entry_of(file)
            sync(file)
    for name, entry in entries.items():
        if name in elsewhere:
            continue
        size = (target / name).stat().st_size
        if size != entry["size"]:
            raise OSError(f"{name} has {size:,} bytes, but {entry['size']:,} were written: the disk lost some")
    # Flush before the rename: after a power failure, a folder with its final name must be complete.
    write_manifest(target, entries, folder.name)
    for path in (*(path for path in target.rglob("*") if path.is_dir()), target):
        sync(path)
    old = folder.with_name(folder.name + TEMPORARY + _OLD)
    # A folder that is not empty cannot be replaced in one step.
    with _renamed(folder, old) if folder.exists() else nullcontext():
        target.rename(folder)
        _IN_WORK.discard(target)
        sync(folder.parent)


def remove_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Remove a checkpoint. If the process is killed meanwhile, the remains are not taken for a checkpoint."""
    folder = Path(folder)
    if folder.exists():  # rename first: a half-removed folder must not have a checkpoint's name
        gone = folder.with_name(folder.name + TEMPORARY + "-gone")
        with _renamed(folder, gone):
            pass


def link(link: Path, name: str) -> None:
    """Point the symlink `link` at its sibling `name`, atomically, and flush it to disk."""
    new = link.with_name(link.name + TEMPORARY)
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    new.replace(link)
    sync(link.parent)


__all__ = ["MANIFEST", "abandon", "link", "neighbours", "prepare", "publish", "remove_checkpoint", "temporary"]
