"""Find assistant turns by the text around them, which a chat template writes the same in every conversation.

`assistant_spans` renders a conversation twice more for each turn. That is exact for any template and slow. Most
templates write a turn as `before + content + after`. These two texts are learned from a conversation that was placed
exactly, and others are placed by them alone. A conversation where anything does not fit (another number of `before`
than turns, content that the template changed, tool calls, reasoning) is placed exactly again, and so is one in fifty
that fit, to compare.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from automodel_trainer.data.assistant_spans import assistant_spans
from automodel_trainer.data.rendered_chat import Message, RenderedChat, Span, text_of

_PLAIN = {"role", "content", "weight"}
_COMPARED = 50  # one in so many


class Marks(NamedTuple):
    """The texts before and after the content of an assistant's turn."""

    before: str
    after: str


class TurnFinder:
    """Finds the spans of assistant turns in conversations of one tokenizer.

    Args:
        special: matches the tokenizer's special tokens.
        last_turn: the last assistant turn only.
    """

    def __init__(self, special: re.Pattern[str], last_turn: bool) -> None:
        self.special, self.last_turn = special, last_turn
        self._marks: dict[tuple[str, bool], Marks | None] = {}
        self._found = 0

    def spans(self, chat: RenderedChat) -> list[Span]:
        """As `assistant_spans`.

        Raises:
            ValueError: a turn cannot be placed.
        """
        turns = [message for message in chat.messages if message["role"] == "assistant"]
        if chat.marked is not None or not turns or not all(map(_is_plain, turns)):
            return assistant_spans(chat, self.special, self.last_turn)
        key = (chat.template, len(turns) > 1)  # some templates end the last turn in another way
        marks = self._marks.get(key)
        found = None if marks is None else _placed(chat.text, turns, marks)
        if found is not None:
            self._found += 1
            wanted = [s for s, m in zip(found, turns) if m.get("weight", 1) != 0]
            if self.last_turn:
                wanted = found[-1:] if turns[-1].get("weight", 1) != 0 else []
            if self._found % _COMPARED:
                return wanted
        exact = assistant_spans(chat, self.special, self.last_turn)
        if found is not None and exact != wanted:
            self._marks[key] = None  # this template is not as simple as it looked
        elif key not in self._marks and not self.last_turn and len(exact) == len(turns):
            self._marks[key] = _learned(chat, turns, exact, self.special)
        elif key not in self._marks and self.last_turn:
            self._marks[key] = self._learned_of_all(chat, turns)
        return exact

    def _learned_of_all(self, chat: RenderedChat, turns: list[Message]) -> Marks | None:
        try:
            return _learned(chat, turns, assistant_spans(chat, self.special), self.special)
        except ValueError:  # an earlier turn cannot be placed, and need not be
            return None


def _is_plain(message: Message) -> bool:
    return bool(text_of(message)) and message.keys() <= _PLAIN


def _learned(chat: RenderedChat, turns: list[Message], spans: list[Span], special: re.Pattern[str]) -> Marks | None:
    places = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if len(spans) != len(turns):
        return None
    found = set()
    for place, message, (start, stop) in zip(places, turns, spans):
        without = chat.render(chat.messages[:place])
        prompt = chat.render(chat.messages[:place], add_generation_prompt=True)
        written = chat.text[start:stop]
        content = text_of(message)
        assert content is not None, "plain messages have text"
        if not without or not prompt or not prompt.startswith(without) or not written.startswith(content):
            return None
        found.add(Marks(prompt[len(without) :], written[len(content) :]))
    marks = found.pop() if len(found) == 1 else None
    if marks is None or not marks.before or not special.search(marks.after):
        return None  # without an end-of-turn token a special token in the content may end the turn
    return marks if _placed(chat.text, turns, marks) == spans else None


def _placed(text: str, turns: list[Message], marks: Marks) -> list[Span] | None:
    """The spans of all turns, if each is written as the marks say and there are no others."""
    if text.count(marks.before) != len(turns):
        return None
    spans, place = [], 0
    for message in turns:
        start = text.index(marks.before, place) + len(marks.before)
        content = text_of(message) or ""
        if not text.startswith(content + marks.after, start):
            return None
        place = start + len(content) + len(marks.after)
        spans.append((start, place))
    return spans
