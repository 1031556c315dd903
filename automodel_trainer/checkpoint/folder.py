"""A checkpoint's folder: whole or not there. Written under another name, listed in a manifest, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from automodel_trainer.checkpoint.manifest import MANIFEST, write_manifest
from automodel_trainer.checkpoint.record import Entry, entry_of, sync

TEMPORARY = ".tmp"  # step-00000010.tmp: being written; step-00000010.tmp-old: being replaced
_OLD = "-old"
_IN_WORK: set[Path] = set()  # temporary folders that this process is writing, maybe in the background


def temporary(folder: Path) -> Path:
    """Where `folder` is written to; the same on every rank without a word between them."""
    return folder.with_name(folder.name + TEMPORARY)


def prepare(folder: Path) -> Path:
    """Remove what crashed saves and removals have left beside `folder`, and create its temporary folder.

    A checkpoint that was about to be replaced when the process died gets its name back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    target = temporary(folder)
    assert target not in _IN_WORK, "one save of a folder at a time"
    for leftover in folder.parent.glob(f"*{TEMPORARY}*"):
        if leftover.is_dir() and not leftover.is_symlink() and leftover not in _IN_WORK:
            replaced = leftover.with_name(leftover.name.removesuffix(TEMPORARY + _OLD))
            if leftover.name.endswith(TEMPORARY + _OLD) and not replaced.exists():
                leftover.rename(replaced)
            else:
                shutil.rmtree(leftover)
    target.mkdir()
    _IN_WORK.add(target)
    return target


def abandon(target: Path) -> None:
    """Remove a temporary folder that will not become a checkpoint, as far as that can be."""
    _IN_WORK.discard(target)
    shutil.rmtree(target, ignore_errors=True)


def publish(target: Path, folder: Path, written: Mapping[str, Entry]) -> None:
    """List the files of `target` in its manifest, flush all to the disk, and rename it to `folder`.

    Args:
        target: the temporary folder.
        folder: its final name.
        written: files by their path in `target`, as the ranks that wrote (and flushed) them have noted them. What lies
            there beside them is read and flushed here.

    Raises:
        OSError: a file is not there, or not as long as it was written.
    """
    entries = dict(written)
    for file in sorted(file for file in target.rglob("*") if file.is_file()):
        name = file.relative_to(target).as_posix()
        if name not in entries:
            entries[name] = entry_of(file)
            sync(file)
    for name, entry in entries.items():
        size = (target / name).stat().st_size
        if size != entry["size"]:
            raise OSError(f"{name} has {size:,} bytes where {entry['size']:,} were written: the disk lost some")
    write_manifest(target, entries, folder.name)
    for path in (*(path for path in target.rglob("*") if path.is_dir()), target):
        sync(path)
    old = folder.with_name(folder.name + TEMPORARY + _OLD)
    if folder.exists():
        folder.rename(old)
    target.rename(folder)
    _IN_WORK.discard(target)
    sync(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def remove_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Remove a checkpoint; killed half-way, what is left is no longer taken for one."""
    folder = Path(folder)
    if folder.exists():
        gone = folder.with_name(folder.name + TEMPORARY + "-gone")
        folder.rename(gone)
        shutil.rmtree(gone)


def link(link: Path, name: str) -> None:
    """Point the symlink `link` at its sibling `name`, in one move, and flush it to the disk."""
    new = link.with_name(link.name + TEMPORARY)
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    new.replace(link)
    sync(link.parent)


__all__ = ["MANIFEST", "abandon", "link", "prepare", "publish", "remove_checkpoint", "temporary"]
