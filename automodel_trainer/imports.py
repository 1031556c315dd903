"""Import without looking for garbage, and say what makes imports slow."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import cache_from_source, find_spec
from pathlib import Path

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


def say_what_compiles_again(package: str) -> None:
    """Print a line if every start compiles the sources of `package` again. Images of containers are often made so."""
    if (folder := compiles_again(package)) and os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"{package} lies in {folder} without bytecode, and Python may not write it: every start compiles it, "
            "which takes several seconds. To end that, run once, as one who may write there: env -u "
            f"PYTHONDONTWRITEBYTECODE {sys.executable} -m compileall -q -j 0 {folder}",
            file=sys.stderr,
        )


def compiles_again(package: str) -> Path | None:
    """The folder that `package` lies in, if it has no bytecode and an import would not leave any."""
    spec = find_spec(package)
    if spec is None or spec.origin is None or not spec.has_location:
        return None
    cache = Path(cache_from_source(spec.origin))
    place = next(folder for folder in cache.parents if folder.is_dir())
    if cache.is_file() or not (sys.dont_write_bytecode or not os.access(place, os.W_OK)):
        return None
    return Path(spec.origin).parents[1]
