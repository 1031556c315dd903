"""The formats of chat and instruction data. Each is converted to a list of messages.

| format | columns | optional |
| --- | --- | --- |
| messages | `messages`: dicts with role, content, tool_calls, … (OpenAI) | `tools` |
| conversations | `conversations`: dicts with from, value (ShareGPT) | `tools`, `system` |
| prompt/completion | `prompt`, `completion`: texts or lists of messages (TRL) | `tools`, `system` |
| instruction/output | `instruction`, `output` (Alpaca) | `input`, `context`, `system`, `history`: pairs of texts |
| instruction/response | `instruction`, `response` (Dolly) | `input`, `context`, `system`, `history` |
| question/answer | `question`, `answer` | `input`, `context`, `system`, `history` |
| prompt/response | `prompt`, `response` | `system` |
| texts | `texts`: dicts with user, assistant (The Cauldron, FineVision) | `system` |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Value

from automodel_trainer.data.arrow_rows import has_exact_values
from automodel_trainer.data.messages import Message, parse_messages, parse_tools

PICTURE_COLUMNS = ("images", "image")
"""Columns that hold the pictures of a row."""
VIDEO_COLUMNS = ("videos", "video")
"""Columns that hold the videos of a row."""
_VISUAL_COLUMNS = (*PICTURE_COLUMNS, *VIDEO_COLUMNS)


@dataclass(frozen=True)
class Conversation:
    """One row of a chat data set.

    Attributes:
        messages: dicts with `role` (system, developer, user, assistant, tool), `content`, and other keys that a chat
            template may read: `tool_calls` (arguments as dicts), `reasoning_content`, `name`, … An assistant message
            with `"weight": 0` is not trained.
        tools: JSON schemas of the functions that the assistant may call.
        prompt_completion: the two texts of a prompt/completion row, for models without a chat template.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    prompt_completion: tuple[str, str] | None = None


@dataclass(frozen=True)
class Format:
    """A data format.

    Attributes:
        name: name of the format.
        required: columns that it needs.
        optional: columns that it may have.
        columns: maps these names to the data set's column names, if they differ.
        exact: columns of the data set whose nested values are as the user wrote them (`null` included).
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    exact: frozenset[str] = frozenset()

    @property
    def columns_read(self) -> dict[str, str]:
        """Our names of the columns that may be read, and the data set's. A column that was mapped is read as that."""
        taken = set(self.columns.values())
        optional = [name for name in self.optional if name in self.columns or name not in taken]
        return {name: self.columns.get(name, name) for name in (*self.required, *optional)}

    def visual_columns(self, names: Iterable[str]) -> tuple[str, ...]:
        """The data set's names of columns of pictures or videos: those that were mapped, or else all that may be."""
        mapped = tuple(self.columns[name] for name in names if name in self.columns)
        return mapped or tuple(name for name in names if name not in self.columns.values())

    def columns_added(self, column_names: Iterable[str]) -> list[str]:
        """Our names of columns of these that an earlier version did not read: samples of it are others."""
        found = set(column_names)
        later = _READ_LATER.get(self.name, ())
        return [name for name, column in self.columns_read.items() if name in later and column in found]

    @property
    def data_columns(self) -> list[str]:
        """The data set's names of the required columns."""
        return [self.columns.get(name, name) for name in self.required]

    def to_messages(self, row: Mapping[str, Any], index: int | None = None) -> Conversation:
        """Convert one row to a conversation.

        Args:
            row: maps column names of the data set to values.
            index: number of the row, for error messages.

        Raises:
            ValueError: a list of messages is empty, a role is unknown, or a message cannot be read.
        """
        values = {name: row.get(column) for name, column in self.columns_read.items()}
        try:
            return self._conversation(values)
        except ValueError as error:
            if index is None:
                raise
            raise ValueError(f"row {index}: {error}") from error

    def _conversation(self, values: dict[str, Any]) -> Conversation:
        tools = parse_tools(values.get("tools"), self._is_exact("tools"))
        first = self.required[0]
        if self.name == "texts":
            return Conversation([*_system(values), *_rounds(values[first])], tools)
        if len(self.required) == 1:
            messages = parse_messages(values[first], self.columns.get(first, first), self._is_exact(first))
            return Conversation([*_system(values), *messages], tools)
        prompt, answer = (values[name] for name in self.required)
        if self.name == "prompt/completion":
            return _prompt_completion(prompt, answer, _system(values), tools)
        [question], [reply] = _turn("user", prompt, first), _turn("assistant", answer, self.required[1])
        for name in ("input", "context"):
            if more := values.get(name):
                question["content"] += f"\n\n{_as_text(more, name)}"
        return Conversation([*_system(values), *_history(values.get("history")), question, reply], tools)

    def _is_exact(self, name: str) -> bool:
        return self.columns.get(name, name) in self.exact


_BESIDE = ("input", "context", "system", "history")
FORMATS = (
    Format("messages", ("messages",), ("tools",)),
    Format("conversations", ("conversations",), ("tools", "system")),
    Format("prompt/completion", ("prompt", "completion"), ("tools", "system")),
    Format("instruction/output", ("instruction", "output"), _BESIDE),
    Format("instruction/response", ("instruction", "response"), _BESIDE),
    Format("question/answer", ("question", "answer"), _BESIDE),
    Format("prompt/response", ("prompt", "response"), ("system",)),
    Format("texts", ("texts",), ("system",)),
)
_READ_LATER = {
    "instruction/output": ("context",),
    "instruction/response": ("input", "history"),
    "question/answer": ("input", "context", "history"),
}


def format_of(rows: Dataset, columns: Mapping[str, str] | None = None) -> Format:
    """The format of a data set; see `detect_format`."""
    exact = frozenset(name for name in rows.column_names if has_exact_values(rows.features, name))
    return replace(detect_format(rows.column_names, columns), exact=exact)


def detect_format(column_names: Iterable[str], columns: Mapping[str, str] | None = None) -> Format:
    """Find the first of `FORMATS` whose required columns all exist.

    Args:
        column_names: the columns of the data set.
        columns: maps our names to the data set's, such as `{"prompt": "my_question", "completion": "my_answer"}`.

    Raises:
        ValueError: no format fits, or `columns` maps an unknown name or names a column that does not exist.
    """
    found, mapped = list(column_names), dict(columns or {})
    _check_mapping(found, mapped)
    available = {*found, *mapped}
    for known in FORMATS:
        names = {*known.required, *known.optional, *_VISUAL_COLUMNS}
        if available.issuperset(known.required) and names.issuperset(mapped):
            return Format(known.name, known.required, known.optional, mapped)
    if "text" in found and not mapped:
        raise ValueError(
            f"The data has a `text` column and no conversation (columns: {found}): use TextDataModule to train on raw "
            f"text. {_how_to_map()}"
        )
    raise ValueError(
        f"No chat format fits the columns {found}{f' with columns={mapped}' if mapped else ''}. {_how_to_map()}"
    )


def refuse_pictures(column_names: Iterable[str], columns: Mapping[str, str] | None = None) -> None:
    """Raise ValueError if rows of conversations have a column of pictures or videos, which text would leave out."""
    known = {**dict.fromkeys(PICTURE_COLUMNS, "pictures"), **dict.fromkeys(VIDEO_COLUMNS, "videos")}
    mapped = dict(columns or {})
    found = [name for name in known if name in mapped or (name in column_names and name not in mapped.values())]
    if found:
        raise ValueError(
            f"The data has a column of {known[found[0]]} ({found[0]!r}), and ChatDataModule would train on the text "
            "alone. Use ImageTextDataModule with a vision-language model, or remove the column."
        )


def refuse_unwanted_answers(rows: Dataset, form: Format) -> None:
    """Raise ValueError if a column says that some completions are bad examples: an objective for pairs wants these."""
    if form.name != "prompt/completion" or rows.features.get("label") != Value("bool"):
        return
    labels = rows.select_columns(["label"]).with_format("arrow")[:]["label"]
    if bad := pc.sum(pc.invert(labels)).as_py():
        raise ValueError(
            f"The data has preferences: {bad:,} of {len(rows):,} completions have the label false, and training "
            "on them would teach answers that nobody wants. Keep the rows with the label true, or remove the column."
        )


def _check_mapping(found: list[str], mapped: dict[str, str]) -> None:
    known = sorted({name for known in FORMATS for name in (*known.required, *known.optional, *_VISUAL_COLUMNS)})
    for ours, theirs in mapped.items():
        if ours not in known:
            raise ValueError(f"columns={mapped}: {ours!r} cannot be mapped. Names that can be mapped: {known}.")
        if theirs not in found:
            raise ValueError(f"columns={mapped}: the data has no column {theirs!r}; its columns are {found}.")


def _how_to_map() -> str:
    shapes = "; ".join(" + ".join(known.required) for known in FORMATS)
    return (
        f"Known columns: {shapes}. Map yours with columns={{known: yours}}, for example "
        f'columns={{"prompt": "my_question", "completion": "my_answer"}}.'
    )


def _system(values: Mapping[str, Any]) -> list[Message]:
    return _turn("system", values["system"], "system") if values.get("system") else []


def _turn(role: str, text: Any, column: str) -> list[Message]:
    if not isinstance(text, str):
        raise ValueError(f"{column!r} must be a string, found {type(text).__name__}: {str(text)[:200]!r}")
    return [{"role": role, "content": text}]


def _as_text(value: Any, column: str) -> str:
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool) and value == value):
        return str(value)  # NaN, which pandas writes for what is missing, is not equal to itself
    raise ValueError(f"{column!r} must be a text, found {type(value).__name__}: {str(value)[:200]!r}")


def _rounds(value: Any) -> list[Message]:
    """Questions and answers, each pair a dict."""
    if not isinstance(value, list) or not value or any(not isinstance(pair, Mapping) for pair in value):
        raise ValueError(f"'texts' must be a list of dicts with 'user' and 'assistant', found {str(value)[:200]!r}")
    return [turn for pair in value for role in ("user", "assistant") for turn in _turn(role, pair.get(role), role)]


def _history(value: Any) -> list[Message]:
    """Earlier questions and answers, before that of the row."""
    if not value:
        return []
    if not isinstance(value, list) or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in value):
        raise ValueError(f"'history' must be a list of pairs, question and answer, found {str(value)[:200]!r}")
    return [
        turn
        for question, answer in value
        for turn in (*_turn("user", question, "history"), *_turn("assistant", answer, "history"))
    ]


def _prompt_completion(
    prompt: Any, completion: Any, system: list[Message], tools: list[dict[str, Any]] | None
) -> Conversation:
    """Prompt and completion may each be a text or a list of messages. Assistant messages in the prompt have no loss."""
    for column, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str | list):
            raise ValueError(
                f"{column!r} must be a text or a list of messages, found {type(value).__name__}: {str(value)[:80]!r}"
            )
    before = _turn("user", prompt, "prompt") if isinstance(prompt, str) else parse_messages(prompt, "prompt")
    after = (
        _turn("assistant", completion, "completion")
        if isinstance(completion, str)
        else parse_messages(completion, "completion")
    )
    before = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in before]
    texts = (prompt, completion) if isinstance(prompt, str) and isinstance(completion, str) and not system else None
    return Conversation([*system, *before, *after], tools, texts)
