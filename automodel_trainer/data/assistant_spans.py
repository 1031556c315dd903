"""Find the assistant's turns in a rendered conversation, for unmodified chat templates.

A template with `{% generation %}` marks them itself. For any other template we render parts of the conversation. The
turn of message i starts at the end of the prompt that inference would give the model (the messages before i, with the
generation prompt). It ends at the end of the messages up to and including i. Both renderings are usually prefixes of
the whole conversation.

Some templates render a message differently once others follow: they strip the reasoning from earlier turns, move the
system message into the last user turn, or end the turn with another token. In that case we find the message by
substitution: we render the conversation again with the content replaced, and the part that differs is the content.
The text that a partial rendering has after its last message's content must follow that content in the whole
conversation too.
"""

from __future__ import annotations

import re
from typing import Any

from automodel_trainer.data.messages import REASONING
from automodel_trainer.data.rendered_chat import (
    Message,
    RenderedChat,
    Span,
    called_function,
    shared_length,
    shortened,
    text_of,
    with_arguments,
)

PRIVATE_USE = [chr(code) for code in range(0xE000, 0xF900)]


def assistant_spans(chat: RenderedChat, special: re.Pattern[str], last_turn: bool = False) -> list[Span]:
    """The character spans that the assistant writes, in order: every turn, or the last one.

    Args:
        chat: the rendered conversation. Assistant messages with `"weight": 0` are left out.
        special: matches the tokenizer's special tokens. A turn ends with its last special token.
        last_turn: return the last assistant message only.

    Raises:
        ValueError: a turn cannot be placed. The message shows the rendered conversation.
    """
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    wanted = [i for i in (turns[-1:] if last_turn else turns) if chat.messages[i].get("weight", 1) != 0]
    for i in wanted:
        _check_calls(chat, i)
    if chat.marked is not None:
        return chat.marked if wanted == turns else _marked_spans(chat, turns, wanted)
    spans = [_turn_span(chat, i, special) for i in wanted]
    for i, span, following in zip(wanted, spans, [*spans[1:], (len(chat.text), 0)]):
        if not span[0] <= span[1] <= following[0]:
            raise _unplaced(chat, i, "its characters overlap those of another turn")
        _check_content(chat, i, span)
    return spans


def _marked_spans(chat: RenderedChat, turns: list[int], wanted: list[int]) -> list[Span]:
    """The spans marked by the template that belong to wanted messages. A turn may have several."""
    starts = [_turn_start(chat, i) for i in turns]
    spans = []
    for span in chat.marked or []:
        owner = sum(start < span[1] for start in starts) - 1
        if owner >= 0 and turns[owner] in wanted:
            spans.append(span)
    return spans


def _turn_span(chat: RenderedChat, i: int, special: re.Pattern[str]) -> Span:
    start = _turn_start(chat, i)
    return start, _without_newline(chat.text, start, _turn_end(chat, i, special), special)


def _turn_start(chat: RenderedChat, i: int) -> int:
    """The end of the generation prompt before message i."""
    before = chat.messages[:i]
    prompt = chat.render(before, add_generation_prompt=True)
    if prompt is None:  # for example, there is no message before: take the header after any question
        return _after_header(chat, i, _generation_prompt(chat, [{"role": "user", "content": "."}]), 0)
    if chat.text.startswith(prompt):
        return len(prompt)
    # The prompt is rendered differently on its own: look for the text that follows its last message.
    end_in_prompt = _content(chat, before, i - 1, prompt, add_generation_prompt=True)[1]
    end_in_text = _content(chat, chat.messages, i - 1, chat.text)[1]
    tail = prompt[end_in_prompt:]
    shared = _shared_header(tail, chat.text[end_in_text:])
    header = _generation_prompt(chat, before)
    if len(shared) < len(tail) and len(shared) <= len(tail) - len(header):
        return _after_header(chat, i, header, end_in_text)
    return min(end_in_text + len(shared), _content(chat, chat.messages, i, chat.text)[0])


def _turn_end(chat: RenderedChat, i: int, special: re.Pattern[str]) -> int:
    """The end of everything that the template writes for message i, before the next message's header."""
    if i == len(chat.messages) - 1:
        return len(chat.text)
    part = chat.render(chat.messages[: i + 1])
    if part is not None and chat.text.startswith(part):
        return len(part)
    content_end = _content(chat, chat.messages, i, chat.text)[1]
    if part is not None:
        tail = part[_content(chat, chat.messages[: i + 1], i, part)[1] :]
        if chat.text.startswith(tail, content_end):
            return content_end + len(tail)
    # A last turn ends differently, so the partial rendering does not help: end at the first special token.
    next_content = _content(chat, chat.messages, i + 1, chat.text)[0]
    if stop := special.search(chat.text, content_end, next_content):
        return stop.end()
    raise _unplaced(chat, i, "its end is not where the conversation up to it ends, and no special token ends it")


def _without_newline(text: str, start: int, end: int, special: re.Pattern[str]) -> int:
    """Cut off the white space after the end-of-turn token, which the model never writes.

    Some templates write no end-of-turn token, and the special token of the next header stops the model. The turn then
    ends after that token.
    """
    stops = [match.end() for match in special.finditer(text, start, end)]
    if stops and not text[stops[-1] : end].strip():
        return stops[-1]
    following = special.match(text, end)
    return following.end() if following else end


def _after_header(chat: RenderedChat, i: int, header: str, after: int) -> int:
    """The end of the last `header` between the position `after` and the content of message i."""
    begin = _content(chat, chat.messages, i, chat.text)[0]
    at = chat.text.rfind(header, after, begin) if header else -1
    if at < 0:
        raise _unplaced(chat, i, f"the generation prompt {header!r} does not appear before it")
    return at + len(header)


def _generation_prompt(chat: RenderedChat, messages: list[Message]) -> str:
    """The text that the template adds to the messages when it asks the assistant to answer."""
    closed, prompt = chat.render(messages) or "", chat.render(messages, add_generation_prompt=True) or ""
    return prompt[shared_length(closed, prompt) :]


def _shared_header(tail: str, text: str) -> str:
    """The common start of a prompt's tail and the text, cut back to before a tag that is shared in part only.

    A generation prompt may contain more than the header of a turn. For example, it may open a reasoning block, which
    earlier turns do not have.
    """
    shared = tail[: shared_length(tail, text)]
    if len(shared) == len(tail):
        return shared
    tags = re.finditer(r"<[^<>\s]*>|\[[^\[\]\s]*\]", tail)
    return next((tail[: tag.start()] for tag in tags if tag.start() < len(shared) < tag.end()), shared)


def _content(chat: RenderedChat, messages: list[Message], i: int, text: str, **options: Any) -> Span:
    """The span of `text` (the rendered messages) that comes from the content of message i.

    Raises:
        ValueError: the template refuses replaced content, or does not show the content.
    """
    # A private-use character that the text does not contain, so that it differs from everything around it.
    mark = next(char for char in PRIVATE_USE if char not in text)
    changed = chat.render([*messages[:i], _substitute(messages[i], mark), *messages[i + 1 :]], **options)
    if changed is None or changed == text:
        raise _unplaced(chat, i, "the template does not show its content, or refuses other content in its place")
    start = shared_length(text, changed)
    return start, max(start, len(text) - shared_length(text[::-1], changed[::-1]))


def _substitute(message: Message, mark: str) -> Message:
    """The message with all its content replaced by `mark`. Names and ids stay, because later messages refer to them."""
    changed = {**message, **{key: mark for key in REASONING if message.get(key)}}
    if message.get("tool_calls"):
        changed["tool_calls"] = [_substitute_call(call, mark) for call in message["tool_calls"]]
    if message.get("content") or changed == message:  # some templates refuse content next to reasoning and calls
        is_parts = isinstance(message.get("content"), list)
        changed["content"] = [{"type": "text", "text": mark}] if is_parts else mark
    return changed


def _substitute_call(tool_call: dict[str, Any], mark: str) -> dict[str, Any]:
    as_text = isinstance(called_function(tool_call).get("arguments"), str)
    return with_arguments(tool_call, mark if as_text else {mark: mark})


def _check_calls(chat: RenderedChat, i: int) -> None:
    """Refuse a template that silently leaves out the tool calls of message i."""
    message = chat.messages[i]
    if not message.get("tool_calls"):
        return
    silent = {key: value for key, value in message.items() if key != "tool_calls"}
    if chat.render([*chat.messages[:i], silent, *chat.messages[i + 1 :]]) == chat.text:
        raise ValueError(
            f"The chat template does not write the tool calls of message {i}. Use a template that supports tool calls, "
            f"or rows without them. The conversation as rendered:\n{shortened(chat.text)}"
        )


def _check_content(chat: RenderedChat, i: int, span: Span) -> None:
    """Check that the assistant's answer lies in its turn. What a template has changed is found by substitution."""
    message, turn = chat.messages[i], chat.text[slice(*span)]
    if (content := text_of(message)) is not None and not message.get("tool_calls"):
        answer = content.split("</think>")[-1].strip()  # templates may drop the reasoning of earlier turns
        if answer in turn:
            return
        start, end = _content(chat, chat.messages, i, chat.text)
        if not span[0] <= start <= end <= span[1]:
            raise _unplaced(chat, i, f"its content is not in the text that was found, {shortened(turn)!r}")


def _unplaced(chat: RenderedChat, i: int, reason: str) -> ValueError:
    return ValueError(
        f"The turn of message {i} (assistant) cannot be placed in the rendered conversation: {reason}. Mark the "
        f"assistant's text with {{% generation %}} … {{% endgeneration %}} in the chat template, or set loss_on='all'. "
        f"The conversation as rendered:\n{shortened(chat.text)}"
    )
