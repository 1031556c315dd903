"""Which document of a packed row each token belongs to, for the masks of the forward that runs."""

from __future__ import annotations

from torch import Tensor

_documents: Tensor | None = None


def set_documents(numbers: Tensor | None) -> None:
    """The next masks are for rows with these documents.

    Args:
        numbers: int64 `[b, s]`, which document a token belongs to, never falling within a row. None: each row is one
            document, or it is not known.
    """
    global _documents
    _documents = numbers


def current_documents() -> Tensor | None:
    """What `set_documents` was told last."""
    return _documents
