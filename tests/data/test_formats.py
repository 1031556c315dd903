from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset

from automodel_trainer.data.arrow_rows import dataset_of_rows
from automodel_trainer.data.formats import Conversation, detect_format, format_of, refuse_unwanted_answers

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief"}
ARGUMENTS = {"city": "Köln", "days": 2}
CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": ARGUMENTS}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


def convert(row: dict[str, Any], columns: dict[str, str] | None = None) -> Conversation:
    return detect_format(list(row), columns).to_messages(row)


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"messages": [SYSTEM, USER, ASSISTANT], "id": 3}, "messages", [SYSTEM, USER, ASSISTANT]),
        ({"messages": json.dumps([USER, ASSISTANT])}, "messages", [USER, ASSISTANT]),
        ({"messages": [USER], "prompt": "x", "completion": "y"}, "messages", [USER]),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            "conversations",
            [USER, ASSISTANT],
        ),
        ({"conversations": [USER, ASSISTANT], "system": "Be brief"}, "conversations", [SYSTEM, USER, ASSISTANT]),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt/completion", [USER, ASSISTANT]),
        ({"instruction": "Hi", "output": "Hello"}, "instruction/output", [USER, ASSISTANT]),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "instruction/output", [USER, ASSISTANT]),
        (
            {"instruction": "Add", "input": "1 2", "output": "Hello", "system": "Be brief"},
            "instruction/output",
            [SYSTEM, {"role": "user", "content": "Add\n\n1 2"}, ASSISTANT],
        ),
        (
            {"instruction": "Hi", "output": "Hello", "history": [["Add", "3"], ("Sub", "1")], "system": "Be brief"},
            "instruction/output",
            [
                SYSTEM,
                {"role": "user", "content": "Add"},
                {"role": "assistant", "content": "3"},
                {"role": "user", "content": "Sub"},
                {"role": "assistant", "content": "1"},
                USER,
                ASSISTANT,
            ],
        ),
        ({"instruction": "Hi", "output": "Hello", "history": None}, "instruction/output", [USER, ASSISTANT]),
        (
            {"instruction": "Add", "context": "1 2", "response": "Hello", "category": "x"},
            "instruction/response",
            [{"role": "user", "content": "Add\n\n1 2"}, ASSISTANT],
        ),
        (
            {"instruction": "Add", "input": "1 2", "context": 3, "response": "Hello", "history": []},
            "instruction/response",
            [{"role": "user", "content": "Add\n\n1 2\n\n3"}, ASSISTANT],
        ),
        (
            {"question": "Add", "context": "1 2", "answer": "Hello"},
            "question/answer",
            [{"role": "user", "content": "Add\n\n1 2"}, ASSISTANT],
        ),
        ({"question": "Hi", "answer": "Hello", "source": "x"}, "question/answer", [USER, ASSISTANT]),
        ({"prompt": "Hi", "response": "Hello", "system": None}, "prompt/response", [USER, ASSISTANT]),
    ],
)
def test_recognised(row: dict[str, Any], name: str, messages: list[dict[str, Any]]) -> None:
    form = detect_format(list(row))
    assert form.name == name
    assert form.to_messages(row).messages == messages


def test_values_of_other_types_are_named() -> None:
    for row, message in (
        ({"instruction": "Hi", "output": "Hello", "history": ["Add", "3"]}, "'history' must be a list of pairs"),
        (
            {"instruction": "Hi", "output": "Hello", "history": [["Add", None]]},
            "'history' must be a string, found None",
        ),
        ({"instruction": "Hi", "input": ["a"], "output": "b"}, r"'input' must be a text, found list"),
        ({"instruction": None, "input": "1 2", "output": "3"}, "'instruction' must be a string, found NoneType"),
        ({"question": ["a"], "context": "1 2", "answer": "3"}, "'question' must be a string, found list"),
        ({"instruction": "Hi", "input": float("nan"), "output": "b"}, "'input' must be a text, found float: 'nan'"),
        ({"instruction": "Hi", "input": True, "output": "b"}, "'input' must be a text, found bool"),
        ({"messages": [USER, {**ASSISTANT, "loss": False}]}, "message 1 has 'loss': false, .* Write 'weight': 0"),
        ({"messages": [{**ASSISTANT, "train": False}]}, "message 0 has 'train': false"),
        ({"messages": [{**ASSISTANT, "weight": 0.5}]}, r"message 0 has weight 0\.5\. Allowed: 1, and 0"),
        ({"messages": [{**ASSISTANT, "weight": "0"}]}, r"message 0 has weight '0'"),
        ({"prompt": "Hi", "completion": 4}, "'completion' must be a text or a list of messages, found int: '4'"),
        ({"prompt": b"Hi", "completion": "4"}, "'prompt' must be a text or a list of messages, found bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(row)


def test_mapped_by_name() -> None:
    row = {"my_q": "Hi", "my_a": "Hello", "messages": [], "persona": "Be brief"}
    mapped = convert(row, {"prompt": "my_q", "completion": "my_a", "system": "persona"})
    assert mapped.messages == [SYSTEM, USER, ASSISTANT]
    assert convert({"dialog": [USER], "tools": [TOOL]}, {"messages": "dialog"}) == Conversation([USER], [TOOL])
    row = {"instruction": "Add", "context": "1 2", "response": "Hello"}
    added = convert(row, {"input": "context", "output": "response"}).messages
    assert added == [{"role": "user", "content": "Add\n\n1 2"}, ASSISTANT]  # once, though context has a meaning too


def test_only_two_texts_are_a_prompt_and_its_completion() -> None:
    assert convert({"prompt": "Hi", "completion": "Hello"}).prompt_completion == ("Hi", "Hello")
    assert convert({"prompt": [USER], "completion": [ASSISTANT]}).prompt_completion is None
    assert convert({"question": "Hi", "answer": "Hello"}).prompt_completion is None
    assert convert({"prompt": "Hi", "completion": "Hello", "system": "Be brief"}).prompt_completion is None


def test_assistant_turns_of_a_prompt_are_not_trained() -> None:
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    assert convert(row).messages == [USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT]
    assert convert({"prompt": [USER], "completion": "Hello"}).messages == [USER, ASSISTANT]


class TestTools:
    @pytest.mark.parametrize("key", ["parameters", "args", "input"])
    def test_arguments_under_another_key_are_no_call_of_nothing(self, key: str) -> None:
        for values in (ARGUMENTS, json.dumps(ARGUMENTS)):
            for call in ({"name": "weather", key: values}, {"function": {"name": "weather", key: values}}):
                with pytest.raises(ValueError, match=f"a call of 'weather' has no 'arguments', and .*'{key}'"):
                    convert({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
        nothing = {"name": "weather", "arguments": {}}
        assert convert({"messages": [{"role": "assistant", "tool_calls": [{"name": "weather", key: {}}]}]})
        assert convert({"messages": [{"role": "assistant", "tool_calls": [nothing]}]})

    @pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS)])
    def test_calls_and_results(self, arguments: Any) -> None:
        call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
        result = {"role": "tool", "tool_call_id": "1", "content": "Sun"}
        row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result, ASSISTANT]}
        calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        assert convert(row).messages == [USER, calling, result, ASSISTANT]

    def test_calls_as_json_flat_or_of_the_older_kind(self) -> None:
        flat = {"name": "weather", "arguments": ARGUMENTS}
        bare = {"type": "function", "function": flat}
        for message in (
            {"role": "assistant", "tool_calls": [flat]},
            {"role": "assistant", "content": "", "tool_calls": json.dumps([flat])},
            {"role": "assistant", "function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}},
            {"from": "function_call", "value": json.dumps(flat)},
        ):
            (parsed,) = convert({"messages": [message]}).messages
            assert parsed == {"role": "assistant", "content": "", "tool_calls": [bare]}

    def test_a_call_in_a_syntax_of_its_own_is_text(self) -> None:
        (message,) = convert({"conversations": [{"from": "function_call", "value": "weather(Köln)"}]}).messages
        assert message == {"role": "assistant", "content": "weather(Köln)"}

    def test_results_of_all_names_and_kinds(self) -> None:
        for role in ("tool", "ipython", "function", "observation", "function_response"):
            (message,) = convert({"conversations": [{"from": role, "value": "Sun"}]}).messages
            assert message == {"role": "tool", "content": "Sun"}
        (message,) = convert({"messages": [{"role": "tool", "content": {"sky": "klar ☀"}}]}).messages
        assert message["content"] == '{"sky": "klar ☀"}'

    @pytest.mark.parametrize(
        "tools",
        [
            [TOOL],
            json.dumps([TOOL]),
            [json.dumps(TOOL)],
            [{"type": "function", "function": {"name": "weather", "parameters": json.dumps(SCHEMA)}}],
        ],
    )
    def test_tools_column(self, tools: Any) -> None:
        assert convert({"messages": [USER], "tools": tools}).tools == [TOOL]

    @pytest.mark.parametrize("tools", [None, [], "", "[]"])
    def test_no_tools(self, tools: Any) -> None:
        assert convert({"messages": [USER], "tools": tools}).tools is None

    @pytest.mark.parametrize("calls", ["weather(Köln)", [3], [{"arguments": {}}]])
    def test_calls_that_cannot_be_read(self, calls: Any) -> None:
        with pytest.raises(ValueError, match=r"tool call"):
            convert({"messages": [{"role": "assistant", "content": "", "tool_calls": calls}]})


def test_keys_that_arrow_adds_are_dropped() -> None:
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    other = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**CALL, "function": {"name": "now", "arguments": {"zone": "CET"}}}],
    }
    result = {"role": "tool", "tool_call_id": "1", "content": "Sun"}
    rows = Dataset.from_list([{"messages": [USER, calling, result]}, {"messages": [USER, other, ASSISTANT]}])
    assert rows[0]["messages"][0]["tool_calls"] is None  # Arrow has given every message every key
    form = detect_format(rows.column_names)
    assert form.to_messages(rows[0]).messages == [USER, calling, result]
    assert form.to_messages(rows[1]).messages == [USER, other, ASSISTANT]


def test_a_text_under_another_key_is_no_empty_message() -> None:
    rows = [{"messages": [{"role": "user", "text": "Hi"}, ASSISTANT]}]
    form = format_of(dataset_of_rows(rows))
    with pytest.raises(ValueError, match=r"message 0 has no 'content'.* keys are \['role', 'text'\]"):
        form.to_messages(rows[0])
    thought = {"role": "assistant", "reasoning": "r"}
    assert form.to_messages({"messages": [thought]}).messages == [{**thought, "content": ""}]


def test_completions_that_nobody_wants_are_refused() -> None:
    good, bad = ({"prompt": "Hi", "completion": "Hello", "label": wanted} for wanted in (True, False))
    refuse_unwanted_answers(rows := dataset_of_rows([good, good]), format_of(rows))
    with pytest.raises(ValueError, match="1 of 2 completions have the label false"):
        refuse_unwanted_answers(rows := dataset_of_rows([good, bad]), format_of(rows))


def test_other_keys_and_parts_of_text() -> None:
    message = {"role": "assistant", "content": "b", "reasoning_content": "r", "weight": 0}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert convert({"messages": [message]}).messages == [message]
    assert convert({"messages": [{"role": "user", "content": parts}]}).messages == [{"role": "user", "content": "ab"}]


class TestRefusals:
    def test_unknown_columns(self) -> None:
        message = r"\['chosen', 'rejected'\].*messages.*conversations.*instruction \+ output.*columns=\{"
        with pytest.raises(ValueError, match=message):
            detect_format(["chosen", "rejected"])

    def test_text_column(self) -> None:
        with pytest.raises(ValueError, match="TextDataModule"):
            detect_format(["text", "url"])

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"promt": "a"}, r"'promt' cannot be mapped.*Names that can be mapped.*'prompt'"),
            ({"prompt": "c"}, r"no column 'c'.*\['a', 'b'\]"),
            ({"prompt": "a"}, r"No chat format fits the columns \['a', 'b'\] with columns="),
            ({"prompt": "a", "answer": "b"}, r"No chat format fits"),
        ],
    )
    def test_mapping(self, columns: dict[str, str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            detect_format(["a", "b"], columns)

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], r"row 7: 'messages' is an empty list"),
            (None, r"row 7: 'messages' must be a list of messages, found NoneType"),
            ([USER, {"role": "wizard"}], r"row 7: message 1 has the unknown role 'wizard'.*Allowed: .*assistant"),
            ([{"content": "x"}], r"row 7: message 0 has the unknown role 'None'"),
            (["Hi"], r"row 7: message 0 must be a dict"),
            ([{"role": "user", "content": [{"type": "image"}]}], r"row 7: message 0 \(user\) has content that is not"),
        ],
    )
    def test_rows(self, messages: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            detect_format(["messages"]).to_messages({"messages": messages}, index=7)

    def test_texts(self) -> None:
        with pytest.raises(ValueError, match=r"row 0: 'answer' must be a string, found NoneType"):
            detect_format(["question", "answer"]).to_messages({"question": "a", "answer": None}, index=0)
