"""Token ids, positions and labels against the sizes of the model, before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig

from automodel_trainer.data import ChatDataModule, MockDataModule, TextDataModule
from automodel_trainer.data.batches import collate_packed
from automodel_trainer.models.limits import is_rotary, position_limit, vocabulary_size
from automodel_trainer.modules import CausalLMModule
from automodel_trainer.trainer import Trainer
from tests.data.test_packing import document
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

QUIET: dict[str, Any] = {"devices": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
QUIET |= {"enable_progress_bar": False, "max_steps": 1}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "max_position_embeddings": 128}


def chat(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def fit(model: Any, data: Any, folder: Path, tokenizer: Any = None) -> Trainer:
    trainer = Trainer(**QUIET, default_root_dir=folder)
    trainer.fit(CausalLMModule(model, tokenizer=tokenizer or tiny_tokenizer()), data)
    return trainer


def test_learned_positions(tmp_path: Path) -> None:
    """Short chats train though a row is longer than the model has positions; a long chat is refused."""
    model = tiny_model("gpt2", **GPT2)
    for packing in (True, False):
        data = ChatDataModule([chat("2 + 2?", "4")] * 8, packing=packing)
        assert fit(model, data, tmp_path).global_step == 1
        (batch,) = data.first_batch()
        assert batch["position_ids"].max() < 128
    with pytest.raises(ValueError, match=r"train data has 3\d\d tokens.*128 positions.*Set seq_len=128.*learned"):
        fit(model, ChatDataModule([chat("q" * 300, "a")]), tmp_path)
    with pytest.raises(ValueError, match=r"256 tokens.*128 positions"):
        fit(model, TextDataModule(train=[{"text": "a" * 600}], seq_len=256), tmp_path)


def test_rotary_positions(tmp_path: Path) -> None:
    data = MockDataModule(seq_len=64, num_samples=1)
    with pytest.raises(ValueError, match=r"64 tokens.*32 positions.*config_overrides=\{'max_position_embeddings'"):
        fit(tiny_model(max_position_embeddings=32), data, tmp_path)
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert position_limit(tiny_config(max_position_embeddings=32, rope_parameters=scaled)) == 64
    assert is_rotary(tiny_config())
    assert not is_rotary(tiny_config("gpt2"))
    assert position_limit(tiny_config("gpt2", max_position_embeddings=77)) == 77
    assert position_limit(AutoConfig.for_model("bloom")) is None
    assert vocabulary_size(tiny_config("qwen3_5")) is not None  # of its text model


def test_padding_restarts_before_the_last_position() -> None:
    batch = collate_packed([[document(5, 0)], []], 12, pad_id=0, positions=6)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 4, 5] * 2]


def test_tokens_that_the_model_lacks(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])
    last = len(tokenizer) - 1
    model = tiny_model(vocab_size=last)
    message = (
        rf"Sample 1 of the train data has token {last} \('<think>'\).*vocab_size is {last}.*embeddings\({last + 1}\)"
    )
    rows = [chat("q", "a"), chat("q", "<think>b")]
    with pytest.raises(ValueError, match=message):
        fit(model, ChatDataModule(rows, seq_len=64), tmp_path, tokenizer)
    assert fit(model, ChatDataModule(rows[:1], seq_len=64), tmp_path, tokenizer).global_step == 1
    with pytest.raises(ValueError, match=r"token 399.*vocab_size is 262"):
        fit(tiny_model(vocab_size=262), MockDataModule(vocab_size=400, seq_len=16, num_samples=2), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.full((8,), 264)}, "token 264.*vocab_size is 264: ids are 0 to 263"),
        ({"input_ids": torch.full((8,), -3)}, "token -3"),
        ({"labels": torch.full((8,), 500)}, "labels hold 500.*264 classes.*-100"),
        ({"labels": torch.full((8,), -1)}, "labels hold -1"),
        ({"position_ids": torch.arange(600, 608)}, "position 607.*512 positions"),
        ({"labels": torch.arange(7)}, r"labels are \[1, 7\] and input_ids \[1, 8\]"),
        ({"input_ids": torch.rand(8)}, "input_ids are torch.float32. Give token ids, which are int64"),
    ],
)
def test_batches_of_a_user_s_loader(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    row = {"input_ids": torch.arange(8), "labels": torch.arange(8), **changes}
    with pytest.raises(ValueError, match=message):
        fit(tiny_model(), DataLoader([row], batch_size=1), tmp_path)


def test_a_generation_config_that_cannot_be_saved(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    with pytest.raises(ValueError, match=r"(?s)generation_config cannot be saved.*do_sample = True"):
        fit(model, MockDataModule(seq_len=16, num_samples=2), tmp_path)
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = [4, 5]
    fit(model, MockDataModule(seq_len=16, num_samples=2), tmp_path).save_pretrained(tmp_path / "saved")
    assert type(model).from_pretrained(tmp_path / "saved").generation_config.eos_token_id == [4, 5]
