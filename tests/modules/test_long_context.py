"""Stretched positions: the trained model, its export and transformers agree on the config and on what it computes.

An adapter has no config.json: what the base's lacks lies beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import automodel_trainer
from automodel_trainer import CausalLMModule, ChatDataModule, Trainer
from automodel_trainer.models.lora import LoRAConfig
from automodel_trainer.tools.check_export import check_export
from automodel_trainer.tools.export import compare
from automodel_trainer.tools.merge import merge
from tests.harness import close
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


def test_an_adapter_keeps_them(tmp_path: Path) -> None:
    base, export = tmp_path / "model", tmp_path / "export"
    save_tiny_model(base)
    write_chats(tmp_path / "chats.jsonl", 40)
    module = CausalLMModule(str(base), config_overrides=LONGER, lora=LoRAConfig(rank=4), lr=0.1)
    data = ChatDataModule(str(tmp_path / "chats.jsonl"), seq_len=600, micro_batch_size=1, global_batch_size=1)
    trainer = Trainer(**quiet(tmp_path, max_steps=2))
    trainer.fit(module, data)
    with pytest.warns(UserWarning, match=r"unlike that of .*max_position_embeddings=1024, rope_parameters=\{"):
        trainer.save_pretrained(export)
    (checkpoint,) = tmp_path.glob("**/step-*/model")
    for folder in (export, checkpoint):
        assert json.loads((folder / "config_overrides.json").read_text()) == LONGER

    ids = torch.arange(700)[None] % 200
    with torch.no_grad():
        logits = module.model.eval()(ids).logits
        reference = AutoModelForCausalLM.from_pretrained(base, **LONGER)
        close(peft.PeftModel.from_pretrained(reference, export).eval()(ids).logits, logits)  # type: ignore[no-untyped-call]
        plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), export)  # type: ignore[no-untyped-call]
        assert (plain.eval()(ids).logits - logits).abs().max() > 1e-3

        merge(checkpoint.parent, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        close(merged(ids).logits, logits)
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "merged"))
        assert after == {**before, **LONGER}
        assert not [finding for finding in check_export(checkpoint.parent, tmp_path / "merged") if finding.fault]
        assert compare(checkpoint.parent, tmp_path / "merged").mean < 1e-6
        close(automodel_trainer.AutoModelForCausalLM.from_pretrained(export).eval()(ids).logits, logits)
        assert CausalLMModule.load_from_checkpoint(checkpoint.parent).config_overrides == LONGER

    adapter = LoRAConfig(adapter=str(export))
    with pytest.warns(UserWarning, match="trained with another config than this model has: max_position_embeddings"):
        automodel_trainer.AutoModelForCausalLM.from_pretrained(base, lora=adapter)
    unchanged = automodel_trainer.AutoModelForCausalLM.from_pretrained(base, lora=LoRAConfig(rank=4))
    unchanged.save_pretrained(export)  # over the other
    assert not (export / "config_overrides.json").exists()
    base.rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match="The folder of the base model is gone"):
        unchanged.save_pretrained(export)
