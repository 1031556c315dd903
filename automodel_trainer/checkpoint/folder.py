"""A checkpoint's folder: whole or not there. Written under another name, listed in a manifest, renamed."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from automodel_trainer.models.files import check_safetensors

MANIFEST = "manifest.json"
TEMPORARY = ".tmp"  # step-00000010.tmp: being written; step-00000010.tmp-old: being replaced


def check_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Check that a checkpoint is whole, without reading its tensors: every file of its manifest is there, full length.

    Raises:
        ValueError: no such folder, no manifest (a save that did not end), a missing or truncated file (named).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a checkpoint: there is no such folder.")
    for name, entry in read_manifest(folder)["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"The checkpoint {folder} lacks {name}: it was removed, or not copied. {_OTHER}")
        size = file.stat().st_size
        if size != entry["size"]:
            raise ValueError(f"{file} is damaged: it has {size:,} bytes where {entry['size']:,} were written. {_OTHER}")
        if file.suffix == ".safetensors":
            check_safetensors(file)


def is_whole(folder: Path) -> bool:
    """Whether `check_checkpoint` passes."""
    try:
        check_checkpoint(folder)
    except ValueError:
        return False
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """The list of a checkpoint's files: `{"created": seconds, "files": {name: {"size": bytes}}}`.

    Raises:
        ValueError: it is missing or damaged.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        if not isinstance(manifest["files"], dict):
            raise TypeError("no list of files")
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing, so {folder} is no whole checkpoint of this library. {_OTHER}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}. {_OTHER}") from error
    return manifest


def temporary(folder: Path) -> Path:
    """Where `folder` is written to; the same on every rank without a word between them."""
    return folder.with_name(folder.name + TEMPORARY)


def prepare(folder: Path) -> Path:
    """Remove what crashed saves and removals have left beside `folder`, and create its temporary folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f"*{TEMPORARY}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
    target = temporary(folder)
    target.mkdir()
    return target


def publish(target: Path, folder: Path) -> None:
    """List the files of `target` in its manifest, flush all to the disk, and rename it to `folder`."""
    files = sorted(file for file in target.rglob("*") if file.is_file())
    sizes = {str(file.relative_to(target)): {"size": file.stat().st_size} for file in files}
    write_text(target / MANIFEST, json.dumps({"created": time.time(), "files": sizes}, indent=1))
    for path in (*target.rglob("*"), target):
        _sync(path)
    old = folder.with_name(folder.name + TEMPORARY + "-old")
    if folder.exists():
        folder.rename(old)
    target.rename(folder)
    _sync(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def remove_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Remove a checkpoint; killed half-way, what is left is no longer taken for one."""
    folder = Path(folder)
    if folder.exists():
        gone = folder.with_name(folder.name + TEMPORARY + "-gone")
        folder.rename(gone)
        shutil.rmtree(gone)


def write_text(file: Path, text: str) -> None:
    """Write a file and flush it to the disk."""
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=1, allow_nan=False))


def link(link: Path, name: str) -> None:
    """Point the symlink `link` at its sibling `name`, in one move."""
    new = link.with_name(link.name + TEMPORARY)
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    new.replace(link)


def _sync(path: Path) -> None:
    """Flush a file, or a directory's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_OTHER = "Copy it again, or resume from another checkpoint."
