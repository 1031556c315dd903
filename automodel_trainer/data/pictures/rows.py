"""Find the pictures of a row, and make its messages into parts of text and pictures.

A row has pictures in two ways, which may be mixed:

- in a message: a part `{"type": "image", "image" | "url" | "path" | "bytes" | "base64": …}`, or OpenAI's
  `{"type": "image_url", "image_url": {"url": …}}`;
- in a column `images` or `image`: one or several, which stand where the text has `<image>` or a message has a part
  `{"type": "image"}` without a picture. Without any such mark they come first in the first user's turn, as in TRL.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from automodel_trainer.data.formats import PICTURE_COLUMNS, Conversation, Format
from automodel_trainer.data.messages import Message

MARK = "\ufdd0"  # a character that is none: it stands for a picture while messages are parsed
_KINDS = {"image": "image", "image_url": "image", "input_image": "image", "text": "text", "input_text": "text"}
_SOURCES = ("image", "url", "path", "bytes", "base64", "data", "image_url")
_CONTENT = ("content", "value")


class Pictured(NamedTuple):
    """One row: its messages, whose content is a list of parts, and the pictures in their order.

    Attributes:
        conversation: as of the row without pictures; content has `{"type": "image"}` and `{"type": "text"}` parts.
        sources: of the pictures.
    """

    conversation: Conversation
    sources: list[Any]


class RowReader:
    """Reads rows with pictures.

    Args:
        form: the format of the rows.
        mark: the text that stands for a picture of the column.
        column: the column with pictures; None: `images` or `image`.
    """

    def __init__(self, form: Format, mark: str = "<image>", column: str | None = None) -> None:
        self.form, self.mark = form, mark
        self.columns = PICTURE_COLUMNS if column is None else (column,)

    def read(self, row: Mapping[str, Any]) -> Pictured:
        """Convert a row.

        Raises:
            ValueError: it cannot be read, or its marks and pictures differ in number.
        """
        slots: list[Any] = []  # a picture of a message, or None for the next one of the column
        marked = dict(row)
        for name in (*self.form.required, *self.form.optional):
            column = self.form.columns.get(name, name)
            if column in row and name != "tools":
                value = row[column]
                if len(self.form.required) == 1 and name == self.form.required[0] and isinstance(value, str):
                    value = _from_json(value) or value  # a list of messages may be its JSON
                marked[column] = self._marked(value, slots)
        conversation = self.form.to_messages(marked)
        given = self._given(row)
        conversation, slots = _with_unmarked(conversation, slots, given)
        wanted = sum(slot is None for slot in slots)
        if wanted != len(given):
            raise ValueError(
                f"the text has {wanted} mark(s) for pictures ({self.mark} or a part of type image) and the column has "
                f"{len(given)} picture(s). Give one picture for each mark."
            )
        column_pictures = iter(given)
        sources = [next(column_pictures) if slot is None else slot for slot in slots]
        messages = [_in_parts(message) for message in conversation.messages]
        return Pictured(
            Conversation(messages, conversation.tools, None if sources else conversation.prompt_completion), sources
        )

    def _given(self, row: Mapping[str, Any]) -> list[Any]:
        """The pictures of the column."""
        for name in self.columns:
            value = row.get(name)
            value = json.loads(value) if isinstance(value, str) and value.lstrip()[:1] == "[" else value
            if value is None or value == "" or (isinstance(value, list) and not value):
                continue
            return list(value) if isinstance(value, list | tuple) else [value]
        return []

    def _marked(self, value: Any, slots: list[Any]) -> Any:
        """A text, a message or a list of them, with `MARK` in place of each picture."""
        if isinstance(value, str):
            return self._marked_text(value, slots)
        if isinstance(value, list | tuple):
            return [self._marked(item, slots) for item in value]
        if not isinstance(value, dict):
            return value
        if kind := self._part(value):
            return self._marked_part(value, kind, slots)
        return {key: self._marked(item, slots) if key in _CONTENT else item for key, item in value.items()}

    def _marked_text(self, text: str, slots: list[Any]) -> str:
        if MARK in text:
            raise ValueError(f"the text holds the character {MARK!r}, which Unicode reserves. Remove it.")
        slots += [None] * text.count(self.mark)
        return text.replace(self.mark, MARK)

    def _part(self, value: dict[str, Any]) -> str | None:
        """The type of a part of content; None for a message."""
        kind = value.get("type")
        return kind if isinstance(kind, str) and not {"role", "from"} & value.keys() and kind != "function" else None

    def _marked_part(self, part: dict[str, Any], kind: str, slots: list[Any]) -> dict[str, Any]:
        if kind not in _KINDS:
            raise ValueError(
                f"a message has a part of type {kind!r}, which is not supported. Allowed: {', '.join(sorted(_KINDS))}. "
                "Give the frames of a video as pictures."
            )
        if _KINDS[kind] == "text":
            return {"type": "text", "text": self._marked_text(str(part.get("text") or ""), slots)}
        slots.append(_source(part))
        return {"type": "text", "text": MARK}


def _source(part: dict[str, Any]) -> Any:
    """The picture of a part; None if a column has it."""
    for key in _SOURCES:
        value = part.get(key)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if value is None or value == "":
            continue
        if key == "base64" and isinstance(value, str):
            return base64.b64decode(value)
        return value
    return None


def _with_unmarked(
    conversation: Conversation, slots: list[Any], given: Sequence[Any]
) -> tuple[Conversation, list[Any]]:
    """Pictures of a column that nothing marks come first in the first user's turn."""
    if slots or not given:
        return conversation, slots
    messages = list(conversation.messages)
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise ValueError("the row has pictures, no mark for them, and no user's turn that they could stand in.")
    messages[first] = {**messages[first], "content": MARK * len(given) + str(messages[first].get("content") or "")}
    return Conversation(messages, conversation.tools), [None] * len(given)


def _in_parts(message: Message) -> Message:
    """A message whose content is a list of parts. A message without content, such as a call, stays as it is."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    if message["role"] == "assistant" and MARK in content:
        raise ValueError("an assistant's turn has a picture, and this model is trained to write text.")
    pieces: list[dict[str, Any]] = []
    for index, text in enumerate(content.split(MARK)):
        if index:
            pieces.append({"type": "image"})
        if text:
            pieces.append({"type": "text", "text": text})
    return {**message, "content": pieces or [{"type": "text", "text": ""}]}


def as_text(messages: Iterable[Message]) -> list[Message]:
    """Messages whose parts of text are joined, for templates that take text alone."""
    return [
        {**m, "content": "".join(part["text"] for part in m["content"])} if isinstance(m.get("content"), list) else m
        for m in messages
    ]


def _from_json(value: str) -> Any:
    """The list or object that a text is the JSON of; None if it is none."""
    if value.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return None
