"""Chat templates that write content part by part, and nothing of content that is a text."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

REFUSALS = (TemplateError, TypeError, KeyError, AttributeError, ValueError)
"""Exceptions that templates raise for a conversation they do not support."""


def wants_parts(template: str, special_tokens: dict[str, Any]) -> bool:
    """Whether a chat template leaves out content that is a text, and writes a list of parts.

    Some templates of vision-language models do so: they look for parts of each type, and a text has none.
    """
    return _wants_parts(template, tuple((n, token) for n, token in special_tokens.items() if isinstance(token, str)))


def any_wants_parts(templates: str | dict[str, str] | None, special_tokens: dict[str, Any]) -> bool:
    """Whether one of a tokenizer's templates does; it has several by name, one, or none."""
    each = templates.values() if isinstance(templates, dict) else [templates] if templates else []
    return any(wants_parts(template, special_tokens) for template in each)


@lru_cache(maxsize=16)
def _wants_parts(template: str, variables: tuple[tuple[str, str], ...]) -> bool:
    mark = "\ue000"
    tokens: Any = dict(variables)
    shown = []
    for content in (mark, [{"type": "text", "text": mark}]):
        chat = [{"role": "user", "content": content}]
        try:
            rendered: Any = render_jinja_template(conversations=[chat], chat_template=template, **tokens)
        except REFUSALS:
            return False
        shown.append(mark in rendered[0][0])
    return shown == [False, True]


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose text is a list of one part."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
