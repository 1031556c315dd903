"""Small helpers for messages: short lists of names, a guess at a misspelled one, an error in a line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def listed(names: Iterable[str], limit: int = 4) -> str:
    """The first `limit` names in the order given: `a, b, c and 2 more`. An empty iterable gives an empty string."""
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'fsdp2'?` with the known name closest to `name`; an empty string if none is close."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def first_line(error: Exception | None) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
