"""Stretched positions: the trained model, its export and transformers agree on the config and on what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from automodel_trainer import CausalLMModule, ChatDataModule, Trainer
from tests.test_trainer import quiet
from tests.tiny import save_tiny_model, write_chats

ROPE = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 256}
LONGER: dict[str, Any] = {"max_position_embeddings": 1024, "rope_parameters": ROPE}


def test_stretched_positions_are_exported(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    write_chats(tmp_path / "chats.jsonl", 40)
    module = CausalLMModule(str(tmp_path / "model"), config_overrides=LONGER)
    data = ChatDataModule(str(tmp_path / "chats.jsonl"), seq_len=600, micro_batch_size=1, global_batch_size=1)
    trainer = Trainer(**quiet(tmp_path, max_steps=1))
    trainer.fit(module, data)
    trainer.save_pretrained(tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert exported.config.max_position_embeddings == 1024
    assert exported.config.rope_parameters == ROPE
    ids = torch.arange(700)[None] % 200
    short = AutoModelForCausalLM.from_pretrained(tmp_path / "export", max_position_embeddings=512, rope_parameters={
        "rope_type": "default", "rope_theta": 10000.0,
    }).eval()  # fmt: skip
    with torch.no_grad():
        logits = module.model.eval()(ids).logits
        assert torch.allclose(exported(ids).logits, logits, atol=1e-6)
        assert not torch.allclose(short(ids).logits, logits, atol=1e-4)
