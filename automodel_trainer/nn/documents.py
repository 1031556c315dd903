"""Which document of a packed row each token belongs to, for the masks of the current forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class _Forward:
    documents: Tensor | None = None


_current = _Forward()


def set_documents(numbers: Tensor | None) -> None:
    """Masks that are made from now on are for rows with these documents.

    Args:
        numbers: int64 `[b, s]`, the number of each token's document, ascending within a row. None: every row is one
            document, or it is not known.
    """
    _current.documents = numbers


def current_documents() -> Tensor | None:
    """What `set_documents` was given last, `[b, s]`."""
    return _current.documents
