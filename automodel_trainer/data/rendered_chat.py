"""A conversation rendered by a tokenizer's chat template. Parts of it can be rendered again."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from automodel_trainer.data.messages import REASONING
from automodel_trainer.nn.content_parts import REFUSALS, in_parts, wants_parts

Message = dict[str, Any]
Span = tuple[int, int]
"""Characters [start, end) of the rendered text."""

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
SHOWN = 2000
"""Maximum number of characters of a text in an error message."""


class RenderedChat:
    """A conversation rendered by the chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: the conversation.
        tools: JSON schemas for the template.

    Attributes:
        messages: the messages as given to the template, without keys whose value is None. The arguments of tool calls
            are dicts, or JSON strings for templates that do not accept dicts. Content is text, or a part of text for
            templates that write parts alone.
        text: the whole conversation, without a generation prompt.
        marked: the spans that the template marks with `{% generation %}`; None for a template without the marker.

    Raises:
        ValueError: the template refuses the conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None) -> None:
        self.tools = tools or None
        self.template = tokenizer.get_chat_template(tools=self.tools)
        if self.tools and "tools" not in self.template:
            warnings.warn(
                "The data has `tools`, but the chat template does not write them. The model will not see them.",
                stacklevel=3,
            )
        said = {key for message in messages for key in REASONING if message.get(key)}
        if said and not any(key in self.template for key in REASONING):
            warnings.warn(
                f"The data has `{min(said)}`, but the chat template does not write it. The model will not see these "
                "thoughts. Use a template that writes them, or put them into `content`.",
                stacklevel=3,
            )
        self.variables: dict[str, Any] = tokenizer.special_tokens_map
        self.messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if wants_parts(self.template, self.variables):
            self.messages = [in_parts(message) for message in self.messages]
        try:
            self.text, self.marked = self._render_whole()
        except REFUSALS as error:
            raise ValueError(
                f"The chat template refused the conversation: {type(error).__name__}: {error}\n"
                f"Roles: {[message.get('role') for message in self.messages]}\n"
                f"Messages: {shortened(repr(self.messages))}"
            ) from error

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str | None:
        """Render other messages (some of these, or changed ones). None if the template refuses them."""
        try:
            return self._render(messages, add_generation_prompt)[0] if messages else None
        except REFUSALS:
            return None

    def _render_whole(self) -> tuple[str, list[Span] | None]:
        marks = GENERATION.search(self.template) is not None
        try:
            return self._render(self.messages, marks=marks)
        except TypeError:  # for example, the template concatenates the arguments with a string
            as_text = [_with_text_arguments(message) for message in self.messages]
            if as_text == self.messages:
                raise
            self.messages = as_text
            return self._render(self.messages, marks=marks)

    def _render(
        self, messages: list[Message], add_generation_prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[Span] | None]:
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=self.tools,
            chat_template=self.template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=marks,
            **self.variables,
        )
        return rendered[0][0], rendered[1][0] if marks else None


def text_of(message: Message) -> str | None:
    """The content, if it is text or one part of text."""
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1 and content[0].get("type") == "text":
        content = content[0].get("text")
    return content if isinstance(content, str) else None


def shortened(text: str) -> str:
    """The first `SHOWN` characters of a text, for an error message."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text) - SHOWN} more characters)"


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the common prefix of two sequences."""
    differing = (i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    return next(differing, min(len(first), len(second)))


def called_function(tool_call: dict[str, Any]) -> dict[str, Any]:
    """The dict with `name` and `arguments`: under `function` in OpenAI's format, otherwise the call itself."""
    function = tool_call.get("function")
    return function if isinstance(function, dict) else tool_call


def with_arguments(tool_call: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """A copy of a tool call with other arguments."""
    function = called_function(tool_call)
    changed = {**function, "arguments": arguments}
    return changed if function is tool_call else {**tool_call, "function": changed}


def _with_text_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_text_argument(call) for call in message["tool_calls"]]}


def _with_text_argument(tool_call: dict[str, Any]) -> dict[str, Any]:
    arguments = called_function(tool_call).get("arguments")
    if not isinstance(arguments, dict):
        return tool_call
    return with_arguments(tool_call, json.dumps(arguments, ensure_ascii=False))
