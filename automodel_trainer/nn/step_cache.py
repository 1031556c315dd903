"""Cache tensors derived from weights (copies, codes, scales) for as long as the weights do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class _State:
    """The span in which weights do not change: an object of its own for each span, None outside of one.

    It is shared by all threads: autograd may recompute a forward in threads of its own.
    """

    span: object | None = None


_state = _State()


@contextmanager
def unchanged_weights() -> Iterator[None]:
    """Promise that weights do not change inside: the forwards and backwards of one optimizer step."""
    before, _state.span = _state.span, object()
    try:
        yield
    finally:
        _state.span = before


def weights_are_unchanged() -> bool:
    """Whether we are inside `unchanged_weights`, so that derived tensors stay valid until its end."""
    return _state.span is not None


class StepCache:
    """Tells when tensors derived from weights must be computed again.

    They are stale the first time inside each `unchanged_weights`, and always outside of it.
    """

    def __init__(self) -> None:
        self._span: object | None = None

    def is_stale(self) -> bool:
        """Whether the caller must compute its tensors now. Marks them as fresh for the rest of the span."""
        if _state.span is not None and self._span is _state.span:
            return False
        self._span = _state.span
        return True
