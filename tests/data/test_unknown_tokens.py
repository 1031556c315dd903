"""Text that a tokenizer does not know is reported, with its share and an example."""

from __future__ import annotations

import json
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from automodel_trainer.data import ChatDataModule, TextDataModule
from automodel_trainer.tools.tokenize import main, tokenize_files
from tests.tiny import CHATML

WORDS = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>", "user", "assistant", "the", "cat", "sat"]
KNOWN = "the cat sat"


def words(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>", **special},
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def texts(unknown: int, count: int = 40) -> list[str]:
    """`count` texts; in the last one so many words are unknown."""
    return [KNOWN] * (count - 1) + [f"{KNOWN} {'кот ' * unknown}"]


def share(tokens: list[list[int]]) -> float:
    """The reference: every token counted."""
    return sum(ids.count(0) for ids in tokens) / sum(map(len, tokens))


def test_the_share_is_told_with_an_example() -> None:
    given = texts(20)
    expected = share([[*words()(text)["input_ids"], 1] for text in given])
    assert expected > 0.01
    data = TextDataModule([{"text": text} for text in given], tokenizer=words(), seq_len=16, cache=False)
    with pytest.warns(UserWarning, match=rf"{expected:.1%} of the tokens .*'<unk>'.*row 39 of the data became.*<unk>"):
        data.prepare()
    assert f"{expected:.2%} unknown tokens" in data.summary()

    chats = [[{"role": "user", "content": KNOWN}, {"role": "assistant", "content": text}] for text in given]
    expected = share([words()(words().apply_chat_template(chat, tokenize=False))["input_ids"] for chat in chats])
    rows = [{"messages": chat} for chat in chats]
    chat_data = ChatDataModule(rows, tokenizer=words(), seq_len=64, cache=False)
    with pytest.warns(UserWarning, match=rf"{expected:.1%} of the tokens .*row 39 of the data"):
        chat_data.prepare()


@pytest.mark.parametrize("workers", [0, 1])
def test_of_a_stream(workers: int) -> None:
    rows = [{"text": text} for text in texts(20)]
    data = TextDataModule(
        rows, tokenizer=words(), seq_len=16, streaming=True, shuffle_buffer=0, num_workers=workers, micro_batch_size=4
    )
    data.prepare()
    message = r"the stream: so far .* of the tokens are the unknown token.*<unk> <unk>"
    with pytest.warns(UserWarning, match=message) as told:
        list(islice(data.train_dataloader(), 8))
    assert len([w for w in told if "unknown token" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("unknown", "special"),
    [(1, {}), (0, {}), (20, {"eos_token": "<unk>", "bos_token": "<unk>"})],
    ids=["a stray word", "none", "the end of a text has the id"],
)
def test_no_warning(unknown: int, special: dict[str, str]) -> None:
    data = TextDataModule(
        [{"text": text} for text in texts(unknown)], tokenizer=words(**special), seq_len=16, cache=False
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unknown token.*")
        data.prepare()
    assert ("unknown tokens" in data.summary()) == (unknown == 1)


def test_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    words().save_pretrained(tmp_path / "tokenizer")
    given = texts(20)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in given))
    done = tokenize_files(str(tmp_path / "a.jsonl"), str(tmp_path / "tokenizer"), tmp_path / "one", workers=1)
    assert done["unknown"] == 20
    output = ["--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "two"), "--workers", "1"]
    main([str(tmp_path / "a.jsonl"), *output])
    assert f"{20 / done['tokens']:.1%} of the tokens are the unknown token" in capsys.readouterr().out
