"""Folders that are prepared once: written under a temporary name, and renamed when they are complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER = ".prepared.json"


@contextmanager
def new_folder(folder: Path, made_from: dict[str, object]) -> Iterator[Path | None]:
    """A temporary folder that is renamed to `folder` if the block succeeds. None if another process has made it.

    `made_from` is stored in it; a folder that was made from something else is replaced.
    """
    from filelock import FileLock

    temporary = folder.with_name(f".{folder.name}.unfinished")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if is_prepared(folder, made_from):
            yield None
            return
        shutil.rmtree(temporary, ignore_errors=True)  # left by an interrupted preparation
        temporary.mkdir()
        try:
            yield temporary
            (temporary / MARKER).write_text(json.dumps(made_from) + "\n", encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_prepared(folder: Path, made_from: dict[str, object]) -> bool:
    """Whether `new_folder` has made this folder from the same."""
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8")) == made_from
    except (OSError, ValueError):
        return False
