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


def check_text(value: Any, column: str, place: str) -> str | None:
    """A value of the text column: a text, or None if it is missing.

    Args:
        value: the value.
        column: the name of the column.
        place: where the value stands: the row, and the file if there is one.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: {half_a_character(error)}") from error
    if isinstance(value, str | None):
        return value
    raise ValueError(
        f"{place}: column {column!r} must hold texts, found {type(value).__name__}: {str(value)[:80]!r}. Give the "
        "column of the text."
    )


def half_a_character(error: UnicodeEncodeError) -> str:
    """What to tell a user about a text that UTF-8 cannot hold."""
    code = f"\\u{ord(error.object[error.start]):04x}"
    return (
        f"a text holds {code}, half of a character, which no file of UTF-8 can hold: {error.object[:60]!r}. Remove it, "
        "or write the character whole."
    )


def encode_documents(tokenizer: Any, texts: list[str | None]) -> list[list[int]]:
    """The tokens of each text: BOS if the tokenizer adds it, the text, and exactly one EOS.

    An empty or missing text has no tokens. A text that begins with BOS or ends with EOS itself, as a rendered
    conversation does, has one of each too.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """
    end = document_end(tokenizer)
    present = [text for text in texts if text]
    encoded = iter(tokenizer(present, verbose=False)["input_ids"] if present else [])
    return [_framed(next(encoded), tokenizer.bos_token_id, end) if text else [] for text in texts]


def _framed(ids: list[int], begin: int | None, end: int) -> list[int]:
    while len(ids) > 1 and begin is not None and ids[0] == ids[1] == begin != end:
        ids = ids[1:]
    while len(ids) > 1 and ids[-1] == ids[-2] == end:
        ids = ids[:-1]
    return ids if ids and ids[-1] == end else [*ids, end]
