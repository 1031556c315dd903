"""Tell whether the files of a stream are still those in which a checkpoint's place was counted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from automodel_trainer.data.files import DataFile

SAMPLED = 1 << 16
"""Bytes at the beginning and at the end of a file that are compared."""

Mark = tuple[str, int, str]
"""A file's name, its size, and a hash of its ends; "" for a file that is not on a disk here."""


def marks_of(files: Sequence[DataFile]) -> list[Mark]:
    """What tells each file from another one."""
    return [(os.path.basename(f.path), size := int(f.state[0]), _ends(f.path, size)) for f in files]


def check_marks(then: Sequence[Sequence[object]], files: Sequence[DataFile]) -> None:
    """Check that the files begin as they did when they were marked. Lines and files may have been added at the end.

    Raises:
        ValueError: a file is another, or is gone. The message names it.
    """
    for place, (name, size, ends) in enumerate(then):
        file = files[place] if place < len(files) else None
        if file is None or os.path.basename(file.path) != name:
            found = "there is none" if file is None else os.path.basename(file.path)
            raise ValueError(_changed(f"file {place + 1} of the stream was {name}, and now {found}"))
        assert isinstance(size, int), "as `marks_of` wrote it"
        if int(file.state[0]) < size or _ends(file.path, size) != ends:
            raise ValueError(_changed(f"{file.path} is not as it was"))


def _changed(what: str) -> str:
    return (
        f"{what}, so the checkpoint's place in the stream means other rows. Restore the files; or keep the optimizer "
        "and begin with this data (fit(resume='data'), --resume data)."
    )


def _ends(path: str, size: int) -> str:
    if "://" in path:
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for start in (0, max(0, size - SAMPLED)):
            stream.seek(start)
            digest.update(stream.read(min(SAMPLED, size - start)))
    return digest.hexdigest()[:16]
