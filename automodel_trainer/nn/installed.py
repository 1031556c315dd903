"""Which versions of other packages are installed. Nothing is imported to find out."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def installed_versions(*distributions: str) -> dict[str, str]:
    """The versions of those of these distributions that are installed, by name."""
    found = {}
    for name in distributions:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
