"""A folder of a cache, locked while something is written into it, or a temporary one where it cannot be written."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


def lock_in(folder: Path, name: str, warning: Callable[[OSError, Path], str]) -> tuple[Path, FileLock]:
    """Make `folder` and take the lock of `name` in it. If that is not possible, do so in a temporary folder.

    Args:
        warning: the text for the user, of the error and of the temporary folder, which is removed at exit.

    Returns:
        the folder to write into, and the lock, which is held.
    """
    lock = FileLock(folder / f"{name}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="automodel_trainer"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        rank_zero_warn(warning(error, folder))
        lock = FileLock(folder / f"{name}.lock")
        lock.acquire()
    return folder, lock
