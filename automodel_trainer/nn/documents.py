"""The document that each token of a packed row belongs to, for the attention masks of the current forward."""

from __future__ import annotations

from torch import Tensor


class _State:
    """The documents of the current forward, shared by all threads: autograd may recompute in threads of its own."""

    documents: Tensor | None = None


_state = _State()


def set_documents(numbers: Tensor | None) -> None:
    """Set the documents that attention masks are built for from now on.

    Args:
        numbers: int64 `[b, s]`, the document number of each token, non-decreasing within a row. None: each row is one
            document, or the documents are not known.
    """
    _state.documents = numbers


def current_documents() -> Tensor | None:
    """The last value given to `set_documents`, int64 `[b, s]` or None."""
    return _state.documents
