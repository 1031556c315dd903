"""While weights do not change, what is made of them (copies, codes, scales) is made once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_span: object | None = None  # what `unchanged_weights` covers; None outside


@contextmanager
def unchanged_weights() -> Iterator[None]:
    """The forwards and backwards of one optimizer step."""
    global _span
    before, _span = _span, object()
    try:
        yield
    finally:
        _span = before


def weights_are_unchanged() -> bool:
    """Whether a span of `unchanged_weights` is open: what is made now serves until its end."""
    return _span is not None


class StepCache:
    """Whether what is made of weights is due: the first time inside `unchanged_weights`, and always outside."""

    def __init__(self) -> None:
        self._span: object | None = None

    def is_stale(self) -> bool:
        """True, and the caller makes it."""
        if _span is not None and self._span is _span:
            return False
        self._span = _span
        return True
