"""Import without looking for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_OF_PYTHON = 2_000  # Python 3.12 freezes a few hundred objects when it starts; whoever freezes later has thousands


@contextmanager
def importing() -> Iterator[None]:
    """A context for code that imports much. Imports make no garbage, and looking for it takes a sixth of their time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            _call_all_old()
            gc.enable()


def _call_all_old() -> None:
    """Let what there is count as old. Otherwise the next allocation looks through all that was imported.

    What is thawed belongs to the oldest generation, and to move it there looks at no object.
    """
    if not user_freezes():  # thawing would undo that
        gc.freeze()
        gc.unfreeze()


def user_freezes() -> bool:
    """Whether someone has frozen objects and not thawed them. Python counts a million in a tenth of a second."""
    return gc.get_freeze_count() > _OF_PYTHON
