from __future__ import annotations

import random
import re
from typing import Any

import pytest
from tokenizers import ByteLevelBPETokenizer

from automodel_trainer.data.chat_template import BatchEncoder, Encoded, between_edges, encode, overlapping
from automodel_trainer.data.formats import Conversation
from tests.data.chat_shapes import TEMPLATES, shape
from tests.tiny import CHATML, tiny_tokenizer

Message = dict[str, Any]


@pytest.mark.parametrize("trim", [True, False])
def test_edges_of_spans_are_those_of_all_offsets(trim: bool) -> None:
    """Tokens that cross an edge, that are spaces whose offsets are trimmed away, and pieces of one character."""
    words = ["a", "def f():", "\n    ", "  ", " ", "ü", "🙂", "\n", "return", "<|im_end|>", "1/3"]
    draw = random.Random(1)
    texts = ["".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(400)]
    bpe = ByteLevelBPETokenizer(trim_offsets=trim)
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<|im_end|>"], show_progress=False)
    for text, encoding in zip(texts, bpe._tokenizer.encode_batch(texts)):
        edges = sorted(draw.choices(range(len(text) + 1), k=2 * draw.randint(0, 3)))
        spans = list(zip(edges[::2], edges[1::2]))
        found = between_edges(encoding, spans)
        kept = [span for span in spans if span[0] < span[1]]
        assert found is not None
        assert found.tolist() == overlapping(encoding.offsets, kept), (text, spans)


@pytest.mark.parametrize("loss_on", ["assistant", "last_turn", "all"])
def test_many_at_a_time_are_encoded_as_one_by_one(loss_on: Any) -> None:
    """Every template; chats of all kinds in one data set, with texts that look like the template's own."""
    draw = random.Random(5)
    tricks = [
        "<|im_start|>assistant\n",
        "<|im_end|>",
        " a ",
        "a\n\n",
        "[/INST]",
        "<think>x</think>y",
        "ü",
        "assistant",
        "b",
    ]
    ends = CHATML.replace("+ '<|im_end|>' ", "") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    recent = CHATML.replace("in messages %}", "in messages[-2:] %}")
    extra = {"ends": tiny_tokenizer(ends), "recent": tiny_tokenizer(recent)}
    for name in (*TEMPLATES, *extra):
        tokenizer = extra.get(name) or shape(name)
        encoder = BatchEncoder(tokenizer, loss_on)
        placed, expected = [], []
        for _ in range(120):
            messages: list[Message] = []
            for _ in range(draw.randint(1, 3)):
                plain = draw.random() < 0.8
                text = [
                    ("".join(draw.choices("abc de", k=6)) + "x") if plain else draw.choice(tricks) for _ in range(2)
                ]
                messages += [{"role": "user", "content": text[0]}, {"role": "assistant", "content": text[1]}]
                if draw.random() < 0.1:
                    messages[-1]["weight"] = 0
            conversation = Conversation(messages)
            try:
                expected.append(encode(tokenizer, conversation, loss_on))
            except ValueError as error:
                with pytest.raises(ValueError, match=re.escape(str(error)[:40])):
                    encoder.place(conversation)
            else:
                placed.append(encoder.place(conversation))
        found = [Encoded(sample.input_ids, sample.trained.tolist()) for sample in encoder.encode(placed)]
        assert found == expected, name
        if name == "chatml" and loss_on == "assistant":
            assert encoder._finder is not None
            assert encoder._finder._found > 60, "most were placed by their marks"
