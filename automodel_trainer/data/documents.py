"""From raw texts to documents of tokens: the text, followed by the end-of-sequence token."""

from __future__ import annotations

from typing import Any


def document_end(tokenizer: Any) -> int:
    """The id of the token that ends a document.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token, which must end every document: set it (`tokenizer.eos_token = ...`) to a "
            "token of its vocabulary."
        )
    return int(tokenizer.eos_token_id)


def encode_documents(tokenizer: Any, texts: list[str | None]) -> list[list[int]]:
    """The tokens of each text: BOS if the tokenizer adds it, the text, and exactly one EOS.

    An empty or missing text has no tokens.

    Raises:
        ValueError: the tokenizer has no EOS token, or a text is none.
    """
    end = document_end(tokenizer)
    if (odd := next((text for text in texts if not isinstance(text, str | None)), None)) is not None:
        raise ValueError(
            f"the text column must hold texts, found {type(odd).__name__}: {str(odd)[:80]!r}. Give the column of the "
            "text."
        )
    present = [text for text in texts if text]
    encoded = iter(tokenizer(present, verbose=False)["input_ids"] if present else [])
    return [_ended(next(encoded), end) if text else [] for text in texts]


def _ended(ids: list[int], end: int) -> list[int]:
    return ids if ids and ids[-1] == end else [*ids, end]
