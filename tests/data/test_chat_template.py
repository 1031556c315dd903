from __future__ import annotations

import re
import time
from importlib.resources import files
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from automodel_trainer.data.chat_template import (
    Encoded,
    encode,
    encode_conversation,
    encode_prompt_completion,
)
from automodel_trainer.data.formats import Conversation
from automodel_trainer.models import generation
from tests.data.chat_shapes import TEMPLATES, shape
from tests.tiny import CHATML, tiny_tokenizer

Message = dict[str, Any]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> Message:
    return {"role": "tool", "content": text, "tool_call_id": "abcdefghi"}


def call(city: str) -> list[dict[str, Any]]:
    return [{"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": city}}}]


def segments(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    """The text of each run of trained tokens."""
    runs = groupby(zip(*encoded), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for trained, run in runs if trained]


CHAT = [user("Hi"), assistant("Hello"), user("Hello"), assistant("Hello")]

# shape, messages, tools, the text of every trained run: marked by hand.
HAND_MARKED = [
    ("chatml", CHAT, None, ["Hello<|im_end|>", "Hello<|im_end|>"]),
    ("chatml", [system("Hello"), user("你好 🌍"), assistant("👩‍👩‍👧 ça va")], None, ["👩‍👩‍👧 ça va<|im_end|>"]),
    ("chatml", [user("a"), assistant(" \n spaced \n\n")], None, [" \n spaced \n\n<|im_end|>"]),
    ("chatml", [user("a"), assistant("x<|im_end|>\ny"), user("b")], None, ["x<|im_end|>\ny<|im_end|>"]),
    ("chatml", [user("a"), assistant("")], None, ["<|im_end|>"]),
    ("chatml", [assistant("I start"), user("b"), assistant("c")], None, ["I start<|im_end|>", "c<|im_end|>"]),
    ("chatml", [user("a"), assistant("b"), assistant("c"), user("d")], None, ["b<|im_end|>", "c<|im_end|>"]),
    ("chatml", [user("a"), assistant("<|im_start|>assistant\nb")], None, ["<|im_start|>assistant\nb<|im_end|>"]),
    ("chatml", [system("a"), user("b")], None, []),
    ("llama3", CHAT, None, ["Hello<|eot_id|>", "Hello<|eot_id|>"]),
    ("llama3", [system("Be brief"), user(" a "), assistant("  😀 trimmed \n")], None, ["😀 trimmed<|eot_id|>"]),
    (
        "llama3",
        [user("a"), assistant("x<|eot_id|>y"), user("b"), assistant("")],
        None,
        ["x<|eot_id|>y<|eot_id|>", "<|eot_id|>"],
    ),
    ("gemma", CHAT, None, ["Hello<end_of_turn>", "Hello<end_of_turn>"]),
    ("gemma", [system("model"), user("model"), assistant(" model ")], None, ["model<end_of_turn>"]),
    ("mistral", CHAT, None, [" Hello</s>", " Hello</s>"]),
    ("mistral", [system("Be brief"), *CHAT], None, [" Hello</s>", " Hello</s>"]),
    (
        "mistral",
        [system("s"), user("s"), assistant("s"), user("s"), assistant("s</s>s")],
        None,
        [" s</s>", " s</s>s</s>"],
    ),
    (
        "mistral",
        [
            user("W?"),
            assistant("", tool_calls=call("Bonn")),
            tool("sun"),
            assistant("Sun"),
            user("W?"),
            assistant("Sun"),
        ],
        TOOLS,
        ['[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bonn"}}]</s>', " Sun</s>", " Sun</s>"],
    ),
    ("qwen", CHAT, None, ["Hello<|im_end|>", "<think>\n\n</think>\n\nHello<|im_end|>"]),
    (
        "qwen",
        [user("a"), assistant("b", reasoning_content="r1"), user("c"), assistant("<think>\nr2\n</think>\n\nd")],
        None,
        ["b<|im_end|>", "<think>\nr2\n</think>\n\nd<|im_end|>"],
    ),
    (
        "qwen",  # the reasoning between calls is written while they last, and gone with the next question
        [
            user("W?"),
            assistant("", tool_calls=call("Köln"), reasoning_content="r1"),
            tool("Sun"),
            assistant("Sun", reasoning_content="r2"),
        ],
        TOOLS,
        [
            '<think>\nr1\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n'
            "</tool_call><|im_end|>",
            "<think>\nr2\n</think>\n\nSun<|im_end|>",
        ],
    ),
    (
        "qwen",
        [
            user("W?"),
            assistant("I look", tool_calls=call("Köln") + call("Bonn"), reasoning_content="r1"),
            tool("Sun"),
            assistant("Sun", reasoning_content="r2"),
            user("Sun"),
            assistant("Sun", reasoning_content="r3"),
        ],
        TOOLS,
        [
            'I look\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>',
            "Sun<|im_end|>",
            "<think>\nr3\n</think>\n\nSun<|im_end|>",
        ],
    ),
    ("reasoner", [user("a"), assistant("<think>r</think>b"), user("c"), assistant("<d>")], None, ["b</s>", "<d></s>"]),
    ("reasoner", [user("a"), assistant("<thing>")], None, ["<thing></s>"]),
    (
        "reasoner",
        [user("a"), assistant("", tool_calls=call("Bonn")), user("c"), assistant("d")],
        None,
        ['<|call|>weather\n{"city": "Bonn"}<|call_end|></s>', "d</s>"],
    ),
    ("harmony", CHAT, None, ["<|message|>Hello<|end|>", "<|message|>Hello<|return|>"]),
    (
        "harmony",  # the first answer is not the last message, so it is found by substitution
        [user("a"), assistant("b"), assistant("", tool_calls=call("Bonn")), tool("Sun"), assistant("Sun")],
        None,
        ["<|message|>b<|end|>", ' to=weather<|message|>{"city": "Bonn"}<|call|>', "<|message|>Sun<|return|>"],
    ),
    ("open", CHAT, None, ["Hello<|user|>", "Hello"]),
    ("marked", CHAT, None, ["Hello<|im_end|>", "Hello<|im_end|>"]),
    ("marked", [system("s"), user("a"), assistant(" b \n"), user("c")], None, [" b \n<|im_end|>"]),
]


@pytest.mark.parametrize(("name", "messages", "tools", "expected"), HAND_MARKED)
def test_hand_marked(name: str, messages: list[Message], tools: list[Any] | None, expected: list[str]) -> None:
    tokenizer = shape(name)
    encoded = encode_conversation(tokenizer, messages, tools)
    assert segments(tokenizer, encoded) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_apply_chat_template(name: str) -> None:
    tokenizer = shape(name)
    for loss_on in ("assistant", "last_turn", "all"):
        encoded = encode_conversation(tokenizer, CHAT, loss_on=loss_on)
        assert encoded.input_ids == tokenizer.apply_chat_template(CHAT, return_dict=False)
        assert len(encoded.trained) == len(encoded.input_ids)


def test_marker_mask_is_that_of_transformers() -> None:
    tokenizer = shape("marked")
    messages = [*CHAT, user("ü"), assistant("😀 b\n")]
    reference = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert encode_conversation(tokenizer, messages).trained == [bool(mask) for mask in reference["assistant_masks"]]


@pytest.mark.parametrize("name", ["chatml", "marked", "qwen", "mistral"])
def test_last_turn(name: str) -> None:
    tokenizer = shape(name)
    all_turns = segments(tokenizer, encode_conversation(tokenizer, CHAT))
    assert segments(tokenizer, encode_conversation(tokenizer, CHAT, loss_on="last_turn")) == all_turns[1:]


def test_thoughts_that_a_template_leaves_out_are_said(recwarn: pytest.WarningsRecorder) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}]
    with pytest.warns(UserWarning, match="has `reasoning_content`, but the chat template does not write it"):
        encode_conversation(tiny_tokenizer(), turns)
    recwarn.clear()
    encode_conversation(shape("qwen"), turns)
    assert not recwarn.list


def test_all_trains_everything_but_bos() -> None:
    tokenizer = shape("llama3")
    encoded = encode_conversation(tokenizer, CHAT, loss_on="all")
    assert [token for token, trained in zip(*encoded) if not trained] == [tokenizer.bos_token_id]
    same = tiny_tokenizer("{{ bos_token }}" + CHATML, bos_token="</s>", eos_token="</s>")
    encoded = encode_conversation(same, [user("a</s>"), assistant("b")], loss_on="all")
    assert encoded.trained.count(False) == 1
    assert not encoded.trained[0]


@pytest.mark.parametrize("name", ["chatml", "marked", "qwen"])
def test_weight_zero_is_read_and_not_trained(name: str) -> None:
    tokenizer = shape(name)
    messages = [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)]
    (only,) = segments(tokenizer, encode_conversation(tokenizer, messages))
    assert only.endswith("d<|im_end|>")
    assert "b<|im_end|>" in tokenizer.decode(encode_conversation(tokenizer, messages).input_ids)


@pytest.mark.parametrize(
    ("opener", "header", "answer", "expected"),
    [
        ("<think>\n", "", "<thing>", "<thing>"),
        ("<think>\n", "</think>", "b", "</think>b"),
        ("<think>\n", "<think></think>", "b", "</think>b"),
        ("Thought:", "", "The answer", "The answer"),
    ],
)
def test_prompt_that_opens_what_a_turn_does_not_have(opener: str, header: str, answer: str, expected: str) -> None:
    template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + ' ' + (HEADER if m.role == 'assistant' else '') "
        "+ m.content + '<|im_end|>' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant ' + OPENER }}{% endif %}"
    )
    tokenizer = tiny_tokenizer(template.replace("HEADER", repr(header)).replace("OPENER", repr(opener)))
    encoded = encode_conversation(tokenizer, [user("a"), assistant(answer), user("c"), assistant(answer)])
    assert segments(tokenizer, encoded) == [expected + "<|im_end|>"] * 2


def test_offsets_that_leave_spaces_out_lose_no_token() -> None:
    tokenizer = shape("chatml")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    answer = "  if x:\n        return   \n    "
    offsets = tokenizer("  if", return_offsets_mapping=True)["offset_mapping"]
    assert any(begin == end for begin, end in offsets)  # the offsets are as bad as they get
    encoded = encode_conversation(tokenizer, [user("a "), assistant(answer), user(" b")])
    assert segments(tokenizer, encoded) == [answer + "<|im_end|>"]


def test_tokenizer_without_offsets() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    assert not tokenizer.is_fast
    messages = [user("a"), assistant("ü 😀"), user("c"), assistant("d")]
    encoded = encode_conversation(tokenizer, messages)
    assert encoded.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert segments(tokenizer, encoded) == ["ü 😀<|im_end|>", "d<|im_end|>"]


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_tokens_of_several_characters(kind: str) -> None:
    """A trained vocabulary, where words take the space before them along, and pieces merge."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "metaspace"))
    if kind == "metaspace":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.post_processor, backend.decoder = processors.ByteLevel(trim_offsets=True), decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    backend.train_from_iterator(
        [" the answer is in the question\n\n    for the answer"] * 9,
        trainers.BpeTrainer(special_tokens=special, vocab_size=400, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATES["mistral"][0]
    messages = [user("the question"), assistant("the answer\n\n    for  the"), user("the answer"), assistant("is")]
    encoded = encode_conversation(tokenizer, messages)
    assert len(encoded.input_ids) < 40  # words are tokens
    runs = groupby(zip(tokenizer.convert_ids_to_tokens(encoded.input_ids), encoded.trained), key=lambda pair: pair[1])
    pieces = ["".join(token for token, _ in run) for trained, run in runs if trained]
    space, newline = ("▁", "\n") if kind == "metaspace" else ("Ġ", "Ċ")
    answers = [" the answer\n\n    for  the</s>", " is</s>"]
    assert pieces == [answer.replace(" ", space).replace("\n", newline) for answer in answers]


# Templates as they come with models, and trl's variants of them that mark what the assistant writes. Left out are those
# whose variant changes the text or counts the header in.
@pytest.mark.parametrize(
    "name", ["llama3", "gemma", "gemma3", "cohere", "phi3", "lfm2", "qwen3_instruct_2507", "idefics3"]
)
def test_real_templates_against_marked_variants(name: str) -> None:
    folder = files(pytest.importorskip("trl")) / "chat_templates"
    plain, marked = folder / f"{name}.jinja", folder / f"{name}_training.jinja"
    if not plain.is_file() or not marked.is_file():
        pytest.skip(f"this trl has no template {name}")
    special = sorted(set(re.findall(r"<\|\w+\|>|<\w+_of_(?:turn|utterance)>", plain.read_text())) - {"<|im_end|>"})
    tokenizer = tiny_tokenizer(plain.read_text(), additional_special_tokens=special)
    found = encode_conversation(tokenizer, [*CHAT, user("ü"), assistant(" 😀 Hello \n")])
    tokenizer.chat_template = marked.read_text()
    reference = encode_conversation(tokenizer, [*CHAT, user("ü"), assistant(" 😀 Hello \n")])
    assert found.input_ids == reference.input_ids
    without_newline = [text.removesuffix("\n") for text in segments(tokenizer, reference)]  # the variants train it
    assert segments(tokenizer, found) == without_newline
    assert len(without_newline) == 3
    assert "Hello" in without_newline[0]  # idefics3 writes parts alone, and nothing of a text


def test_templates_of_parts_get_parts() -> None:
    """In training and in answers: of a text they would write nothing."""
    parts = "{% for p in message.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    head, tail = CHATML.split(
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    )
    template = f"{head}<|im_start|>{{{{ message.role }}}}\n{parts}<|im_end|>{{{{ '\n' }}}}{tail}"
    tokenizer, plain = tiny_tokenizer(template), tiny_tokenizer()
    assert encode_conversation(tokenizer, CHAT) == encode_conversation(plain, CHAT)
    found, expected = (generation.encode(one, CHAT[:1])["input_ids"].tolist() for one in (tokenizer, plain))
    assert found == expected


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=150)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_random_contents_in_chatml(pairs: list[tuple[str, str]]) -> None:
    tokenizer = RANDOM
    messages = [message for question, answer in pairs for message in (user(question), assistant(answer))]
    encoded = encode_conversation(tokenizer, messages)
    trained = tokenizer.decode([token for token, is_trained in zip(*encoded) if is_trained])
    assert trained == "".join(answer + "<|im_end|>" for _, answer in pairs)


words = st.text("ab <>/\n[]{}\"'ü😀", max_size=12).map(str.strip)


@settings(max_examples=150)
@given(st.sampled_from(["qwen", "mistral", "harmony"]), st.lists(st.tuples(words, words), min_size=2, max_size=4))
def test_random_contents_in_templates_that_change_the_past(name: str, pairs: list[tuple[str, str]]) -> None:
    tokenizer, before, after, last = SHAPES[name]
    pairs = [(question + "?", answer) for question, answer in pairs]
    messages = [message for question, answer in pairs for message in (user(question), assistant(answer))]
    encoded = encode_conversation(tokenizer, [system("Be brief"), *messages])
    expected = [before + answer + after for _, answer in pairs[:-1]] + [last.format(pairs[-1][1])]
    assert segments(tokenizer, encoded) == expected


RANDOM = shape("chatml")
SHAPES = {
    "qwen": (shape("qwen"), "", "<|im_end|>", "<think>\n\n</think>\n\n{}<|im_end|>"),
    "mistral": (shape("mistral"), " ", "</s>", " {}</s>"),
    "harmony": (shape("harmony"), "<|message|>", "<|end|>", "<|message|>{}<|return|>"),
}


class TestRefusals:
    def test_no_template(self) -> None:
        with pytest.raises(ValueError, match=r"no chat template.*chatml, plain.*prompt.*completion"):
            encode_conversation(tiny_tokenizer(None), CHAT)

    def test_loss_on(self) -> None:
        with pytest.raises(ValueError, match=r"loss_on='user'.*'assistant', 'last_turn', 'all'"):
            encode_conversation(shape("chatml"), CHAT, loss_on="user")  # type: ignore[arg-type]

    def test_template_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"refused the conversation.*must alternate(.|\n)*'user', 'user'"):
            encode_conversation(shape("gemma"), [user("a"), user("b"), assistant("c")])

    def test_tool_calls_the_template_does_not_write(self) -> None:
        with pytest.raises(ValueError, match=r"does not write the tool calls of message 1"):
            encode_conversation(shape("chatml"), [user("a"), assistant("", tool_calls=call("Bonn"))])

    def test_tools_the_template_does_not_write(self) -> None:
        with pytest.warns(UserWarning, match="does not write them"):
            encode_conversation(shape("chatml"), CHAT, TOOLS)

    def test_turn_that_cannot_be_placed(self) -> None:
        # Every message is numbered from the end, so no part of the conversation reads as it does in the whole.
        template = (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + (loop.length - loop.index)|string + '\\n' "
            "+ m.content + '<|im_end|>' + (loop.revindex)|string }}{% endfor %}"
        )
        with pytest.raises(
            ValueError, match=r"message 1 \(assistant\) cannot be placed(.|\n)*<\|im_start\|>user 3\nHi"
        ):
            encode_conversation(tiny_tokenizer(template), CHAT)

    def test_content_that_the_template_leaves_out(self) -> None:
        """Not the next header in its place."""
        template = CHATML.replace("in messages %}", "in messages if message.role == 'user' %}")
        with pytest.raises(ValueError, match=r"message 1 \(assistant\) .* does not show its content"):
            encode_conversation(tiny_tokenizer(template), [user("q"), assistant("answer"), user("r")])

    def test_content_that_the_template_changes(self) -> None:
        """The letter occurs elsewhere, too."""
        tokenizer = tiny_tokenizer(CHATML.replace("message['content']", "message['content'] | upper"))
        chat = [user("q"), assistant("a"), user("r")]
        assert segments(tokenizer, encode_conversation(tokenizer, chat)) == ["A<|im_end|>"]

    def test_content_out_of_place(self) -> None:
        template = (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '<|im_start|>' }}"
            "{{ messages[loop.index0 - 1].content if loop.index0 else '' }}{% endif %}{% endfor %}"
        )
        with pytest.raises(ValueError, match=r"message 1 \(assistant\) cannot be placed.*its content is not in"):
            encode_conversation(tiny_tokenizer(template), [user("a"), assistant("secret"), user("b")])


class TestPromptCompletion:
    def test_without_template(self) -> None:
        tokenizer = tiny_tokenizer(None)
        row = Conversation([user("2+2="), assistant("4 ü")], prompt_completion=("2+2=", "4 ü"))
        encoded = encode(tokenizer, row)
        assert tokenizer.decode(encoded.input_ids) == "2+2=4 ü<|im_end|>"
        assert segments(tokenizer, encoded) == ["4 ü<|im_end|>"]
        assert segments(tokenizer, encode(tokenizer, row, "all")) == ["2+2=4 ü<|im_end|>"]

    def test_with_template_it_is_a_chat(self) -> None:
        tokenizer = shape("chatml")
        row = Conversation([user("a"), assistant("b")], prompt_completion=("a", "b"))
        assert encode(tokenizer, row) == encode_conversation(tokenizer, row.messages)

    def test_bos_and_eos_are_there_once(self) -> None:
        tokenizer = tiny_tokenizer(None)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A <|im_end|>", special_tokens=[("<s>", 1), ("<|im_end|>", 4)]
        )
        for completion in ("b", "b<|im_end|>"):
            encoded = encode_prompt_completion(tokenizer, "a", completion)
            assert tokenizer.decode(encoded.input_ids) == "<s>ab<|im_end|>"
            assert encoded.trained == [False, False, True, True]
            assert encode_prompt_completion(tokenizer, "a", completion, "all").trained == [False, True, True, True]

    def test_without_eos(self) -> None:
        with pytest.raises(ValueError, match="no EOS token"):
            encode_prompt_completion(tiny_tokenizer(None, eos_token=None), "a", "b")


def test_a_thousand_chats_take_no_time() -> None:
    tokenizer = shape("chatml")
    messages = [user("How are you? " * 5), assistant("Fine, thank you. " * 10)]
    start = time.process_time()
    for _ in range(1000):
        encode_conversation(tokenizer, messages)
    assert time.process_time() - start < 3  # about 0.5 s
