from __future__ import annotations

from itertools import pairwise

import pytest

from automodel_trainer.data.chat_template import Encoded, encode_conversation
from automodel_trainer.data.checks import DataCheck, SampleCheck, check_sample, check_samples, render_tokens
from tests.data.chat_shapes import MARKED, shape
from tests.tiny import CHATML, tiny_tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey 😀"}]


def test_a_good_sample() -> None:
    tokenizer = shape("chatml")
    encoded = encode_conversation(tokenizer, CHAT)
    assert check_sample(tokenizer, encoded) == SampleCheck(trained=len("Hey ") + len("😀".encode()) + 1, stop="trained")
    silent = Encoded(encoded.input_ids, [False] * len(encoded.input_ids))
    assert check_sample(tokenizer, silent) == SampleCheck(trained=0, stop=None)
    tokens = len(encoded.input_ids)
    assert check_samples(tokenizer, [silent, encoded]) == DataCheck(2, 2 * tokens, sum(encoded.trained))


def test_rendered() -> None:
    tokenizer = shape("chatml")
    encoded = encode_conversation(tokenizer, CHAT)
    assert render_tokens(tokenizer, *encoded) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hey 😀<|im_end|>»\n"
    )
    assert (
        render_tokens(tokenizer, *encoded, limit=6)
        == f"<|im_start|>user\n … ({len(encoded.input_ids) - 6} more tokens)"
    )


def test_nothing_to_train() -> None:
    tokenizer = shape("chatml")
    samples = [encode_conversation(tokenizer, CHAT[:1])] * 3
    with pytest.raises(ValueError, match=r"None of the 3 samples has a supervised token(.|\n)*<\|im_start\|>user\nHi"):
        check_samples(tokenizer, samples)
    with pytest.raises(ValueError, match="no samples"):
        check_samples(tokenizer, [])


def test_double_bos() -> None:
    tokenizer = tiny_tokenizer("{{ bos_token }}" + CHATML)
    ids = [tokenizer.bos_token_id, *encode_conversation(tokenizer, CHAT).input_ids]
    with pytest.raises(ValueError, match=r"two BOS tokens \('<s>'\)(.|\n)*<s><s><\|im_start\|>"):
        check_sample(tokenizer, Encoded(ids, [False] * len(ids)))


def test_lengths() -> None:
    with pytest.raises(ValueError, match="3 tokens and 2 marks"):
        check_sample(shape("chatml"), Encoded([1, 2, 3], [True, False]))


def test_eos_outside_the_marker() -> None:
    template = MARKED.replace("message.content + '<|im_end|>' }}{% endgen", "message.content }}{% endgen")
    tokenizer = tiny_tokenizer(template.replace("{{ '\n' }}", "{{ '<|im_end|>\n' }}"))
    encoded = encode_conversation(tokenizer, CHAT)
    assert check_sample(tokenizer, encoded).stop == "masked"
    with pytest.raises(ValueError, match=r"EOS .* is masked(.|\n)*generation(.|\n)*«Hey 😀»<\|im_end\|>"):
        check_samples(tokenizer, [encoded])


def test_eos_outside_the_marker_of_several_turns() -> None:
    """The token after an earlier turn lies between trained ones, and is not trained either."""
    template = MARKED.replace("message.content + '<|im_end|>' }}{% endgen", "message.content }}{% endgen")
    tokenizer = tiny_tokenizer(template.replace("{{ '\n' }}", "{{ '<|im_end|>\n' }}"))
    encoded = encode_conversation(tokenizer, [*CHAT, *CHAT[-2:]])
    assert sum(a and not b for a, b in pairwise(encoded.trained)) == 2
    assert check_sample(tokenizer, encoded).stop == "masked"


def test_eos_masked_as_padding() -> None:
    tokenizer = tiny_tokenizer(pad_token="<|im_end|>")
    ids, trained = encode_conversation(tokenizer, CHAT)
    masked = Encoded(ids, [mark and token != tokenizer.pad_token_id for token, mark in zip(ids, trained)])
    with pytest.raises(ValueError, match=r"pad_token and eos_token are the same, '<\|im_end\|>'"):
        check_samples(tokenizer, [masked])


def test_a_template_without_end_of_turn() -> None:
    tokenizer = shape("open")
    with pytest.warns(UserWarning, match=r"does not learn to stop(.|\n)*«Hey 😀»"):
        check_samples(tokenizer, [encode_conversation(tokenizer, CHAT)])


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral", "qwen", "harmony", "reasoner", "marked"])
@pytest.mark.parametrize("loss_on", ["assistant", "last_turn", "all"])
def test_every_shape_learns_to_stop(name: str, loss_on: str, recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = shape(name)
    check_samples(tokenizer, [encode_conversation(tokenizer, CHAT, loss_on=loss_on)])  # type: ignore[arg-type]
    assert not recwarn.list
