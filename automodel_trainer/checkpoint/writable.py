"""Whether a folder can be written, asked before the work whose result goes there."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_folder(folder: Path, what: str, lost: str = "") -> None:
    """Check that files can be made in a folder, or in the nearest one above it that exists.

    Args:
        folder: the folder; it need not exist.
        what: what will be written, for the message.
        lost: the end of the message: what the check has saved.

    Raises:
        ValueError: they cannot; the message names the folder and the reason.
    """
    existing = folder.absolute()
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"{what} cannot be written to {folder}: {error.strerror or error} ({existing}). Give a folder that can be "
            f"written{lost}."
        ) from error
