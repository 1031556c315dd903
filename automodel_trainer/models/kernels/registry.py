"""Finds kernel libraries: those in `libraries/`, and those that other packages register."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from automodel_trainer.models.kernels import libraries as in_tree
from automodel_trainer.models.kernels.library import PARTS, KernelLibrary

ENTRY_POINT_GROUP = "automodel_trainer.kernels"

# The choices of each part that need no library. The first one is what "auto" is away from a GPU.
BUILT_IN: dict[str, tuple[str, ...]] = {
    "attention": (),  # and transformers' own names
    "loss": ("chunked", "whole"),
    "norm": ("compile",),
    "activation": ("compile",),
    "rope": ("compile",),
    "linear": ("torch",),
    "experts": ("transformers", "grouped"),
    "dispatch": ("all_to_all",),
}

_registered: dict[str, KernelLibrary] = {}


def register(library: KernelLibrary) -> None:
    """Make a library a choice of the `kernels:` section.

    Raises:
        ValueError: another library or a built-in choice has its name, or it offers a part that does not exist.
    """
    _load_in_tree()
    _add(library)


def find(part: str, name: str) -> KernelLibrary | None:
    """The library of this name if it offers this part. None if the name is a built-in choice or unknown."""
    if name == "auto" or name in BUILT_IN[part]:
        return None  # nothing needs to be loaded for the usual choices
    library = _all().get(name)
    return library if library is not None and part in library.offers else None


def choices(part: str) -> tuple[str, ...]:
    """Everything that a part can be set to, except for transformers' names for attention."""
    return ("auto", *BUILT_IN[part], *(library.name for library in libraries() if part in library.offers))


def libraries() -> list[KernelLibrary]:
    """All libraries, installed or not."""
    return list(_all().values())


def _add(library: KernelLibrary) -> None:
    known = _registered.get(library.name)
    if known is library:
        return
    if known is not None or library.name in ("auto", *(name for names in BUILT_IN.values() for name in names)):
        raise ValueError(f"A kernel library or a choice is called {library.name!r} already. Give yours another name.")
    if unknown := library.offers.keys() - set(PARTS):
        raise ValueError(
            f"Kernel library {library.name!r} offers {', '.join(sorted(unknown))}. Parts are: {', '.join(PARTS)}."
        )
    _registered[library.name] = library


def _all() -> dict[str, KernelLibrary]:
    _load_in_tree()
    _load_entry_points()
    return _registered


@cache
def _load_in_tree() -> None:
    """Every file of `libraries/` has a tuple `LIBRARIES`, so a new library needs no line elsewhere."""
    for module in iter_modules(in_tree.__path__, f"{in_tree.__name__}."):
        for library in import_module(module.name).LIBRARIES:
            _add(library)


@cache
def _load_entry_points() -> None:
    """An entry point is a `KernelLibrary`, or something that registers some when it is imported."""
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        found = entry.load()
        if isinstance(found, KernelLibrary):
            _add(found)
