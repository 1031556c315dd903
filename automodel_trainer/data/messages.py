"""Convert messages and tools from the forms that data sets use to the form that chat templates read."""

from __future__ import annotations

import json
from typing import Any

from automodel_trainer.data.arrow_rows import without_none

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
}
"""Maps the roles in data sets to those of chat templates."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold the assistant's thoughts."""

UNTRAINED = ("loss", "train", "training")
"""Keys with which data for other trainers say, by false, that a message is not trained. Ours is `weight`."""

CALLS = ("function_call", "tool_call")
"""ShareGPT roles whose value is a function call in JSON."""


def parse_messages(value: Any, column: str, exact: bool = False) -> list[Message]:
    """Parse a list of messages (role/content or from/value), which may be a JSON string.

    Keys with the value None are dropped, from a message and its calls always. In the arguments of calls they are
    dropped only if Arrow may have added them: it gives all structs of a column the same keys.

    Args:
        value: the list of messages.
        column: name of the column, for error messages.
        exact: the values are as the user wrote them, as those of a JSON string are.

    Raises:
        ValueError: `value` is not a list or is empty, a role is unknown, or content is not text.
    """
    exact = exact or isinstance(value, str)
    value = _from_json(value)
    if not isinstance(value, list):
        raise ValueError(f"{column!r} must be a list of messages, found {type(value).__name__}: {str(value)[:200]!r}")
    if not value:
        raise ValueError(f"{column!r} is an empty list of messages.")
    return [_parse_message(message, i, exact) for i, message in enumerate(value)]


def is_empty_turn(message: Message) -> bool:
    """Whether a message is a turn of the user or the assistant that says nothing, shows and calls nothing."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] if part["type"] == "text" else part["type"] for part in content)
    return message["role"] in ("user", "assistant") and not str(content).strip() and not message.get("tool_calls")


def parse_tools(value: Any, exact: bool = False) -> list[dict[str, Any]] | None:
    """Parse a list of JSON schemas; the list or each schema may be a JSON string. None if there are no tools.

    Args:
        value: the schemas.
        exact: they are as the user wrote them, so `"default": null` stays. Otherwise None may be Arrow's, and is
            dropped.

    Raises:
        ValueError: `value` is anything else.
    """
    exact = exact or isinstance(value, str)
    value = _from_json(value)
    if not value:
        return None
    given = value if isinstance(value, list) else [value]
    tools = [_from_json(tool) if exact or isinstance(tool, str) else without_none(tool) for tool in given]
    for tool in tools:
        if not isinstance(tool, dict):
            raise ValueError(
                f"'tools' must hold JSON schemas (dicts), found {type(tool).__name__}: {str(tool)[:200]!r}"
            )
        function = tool.get("function", tool)
        if isinstance(function, dict) and isinstance(function.get("parameters"), str):
            function["parameters"] = _from_json(function["parameters"])
    return tools


def _parse_message(message: Any, i: int, exact: bool) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"message {i} must be a dict with a role and content, found {str(message)[:200]!r}")
    if len(message) == 2:  # a role and a text: most messages, so nothing more is asked of them
        role, text = message.get("role"), message.get("content")
        if isinstance(role, str) and isinstance(text, str) and role in ROLES and role not in CALLS:
            return {"role": ROLES[role], "content": text}
    parsed = _without_keys_of_none(message) if exact else without_none(message)
    name = str(parsed.pop("role", None) or parsed.pop("from", None))
    if name not in ROLES:
        raise ValueError(f"message {i} has the unknown role {name!r}. Allowed: {', '.join(ROLES)}.")
    content = parsed.pop("content", None)
    content = parsed.pop("value", "") if content is None else content
    calls = _parse_calls(parsed, name, content)
    if calls and name in CALLS:
        content = ""
    rest = {key: value for key, value in parsed.items() if key not in ("tool_calls", "function_call")}
    if exact and not calls and not {"content", "value"} & message.keys():
        _refuse_other_text(rest, message, i)
    if rest.get("weight", 1) not in (0, 1):
        raise ValueError(f"message {i} has weight {rest['weight']!r}. Allowed: 1, and 0: it is not trained.")
    if ROLES[name] == "assistant" and (unread := [key for key in UNTRAINED if rest.get(key) is False]):
        raise ValueError(
            f"message {i} has {unread[0]!r}: false, which is not read, so it would be trained. Write 'weight': 0 there."
        )
    text = _text(content, ROLES[name], i)
    return {"role": ROLES[name], "content": text, **rest, **({"tool_calls": calls} if calls else {})}


def _refuse_other_text(rest: Message, message: Message, i: int) -> None:
    """A message without content that says something under another key would be an empty one."""
    if any(isinstance(text, str) and text.strip() and key not in REASONING for key, text in rest.items()):
        raise ValueError(f"message {i} has no 'content' (or 'value'). Its keys are {list(message)}.")


def _text(content: Any, role: str, i: int) -> str:
    """Content as text: text parts are joined, and the structured result of a tool becomes JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(map(_is_text, content)):
        return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
    if role == "tool":
        return json.dumps(content, ensure_ascii=False)
    pictures = isinstance(content, list) and any("image" in str(p.get("type")) for p in content if isinstance(p, dict))
    how = " Use ImageTextDataModule with a vision-language model for messages with pictures." if pictures else ""
    raise ValueError(f"message {i} ({role}) has content that is not text: {str(content)[:200]!r}.{how}")


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and part.get("type", "text") == "text" and "text" in part)


def _parse_calls(message: Message, name: str, content: Any) -> list[dict[str, Any]]:
    """The tool calls of a message: from `tool_calls`, the older `function_call`, or the value of a ShareGPT call."""
    given = message.get("tool_calls") or message.get("function_call")
    calls = _from_json(given or (content if name in CALLS else []))
    calls = [calls] if isinstance(calls, dict) else calls
    if isinstance(calls, list) and all(isinstance(call, dict) for call in calls):
        return [_parse_call(call) for call in calls]
    if given:
        raise ValueError(f"tool calls must be a list of dicts or its JSON, found {str(given)[:200]!r}")
    return []  # a call in a custom syntax: keep it as the text of the message


def _parse_call(call: dict[str, Any]) -> dict[str, Any]:
    """Normalize a call to `{"type": "function", "function": {"name", "arguments": dict}}`, and keep its other keys."""
    nested = isinstance(call.get("function"), dict)
    function = dict(call["function"] if nested else {key: call[key] for key in call if key not in ("id", "type")})
    if not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call needs a function name (a string), found {str(call)[:200]!r}")
    if function.get("arguments") is None:
        _refuse_other_arguments(function)
    function["arguments"] = _from_json(function.get("arguments")) or {}
    rest = {key: value for key, value in call.items() if (nested or key in ("id", "type")) and key != "function"}
    return {"type": "function", **_without_keys_of_none(rest), "function": _without_keys_of_none(function)}


def _refuse_other_arguments(function: dict[str, Any]) -> None:
    """A call without arguments that has values under another key would be trained as a call of nothing."""
    if other := [key for key, value in function.items() if value and isinstance(_from_json(value), dict | list)]:
        raise ValueError(
            f"a call of {function['name']!r} has no 'arguments', and values under {other[0]!r}. Call them 'arguments'."
        )


def _without_keys_of_none(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}


def _from_json(value: Any) -> Any:
    """Parse a JSON object or list from a string. Other values, and other text, are returned unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
