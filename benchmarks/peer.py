"""What peers need: a folder of random weights to load, and Unsloth's model of it. Nothing of ours is imported here."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

SPECIAL = {"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128002}
ADAPTERS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0, "bias": "none"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_random(folder: str | Path, config: Any) -> None:
    """Write random weights in bf16 and a tokenizer, for peers that can only load from a folder."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    names = {128000: "<s>", 128001: "</s>", 128002: "<pad>", 128003: "<unk>"}
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)}
    vocabulary |= {names.get(i, f"t{i}"): i for i in range(256, max(config.vocab_size, 128256))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.ByteFallback()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def unsloth_model(
    folder: str | Path, seq_len: int, *, checkpointing: str | bool = False, nf4: bool = False, whole: bool = False
) -> Any:
    """Unsloth's model with its own loading and adapters (r=16 on every linear layer), in training mode.

    Args:
        folder: that `save_random` has written.
        checkpointing: its `use_gradient_checkpointing`.
        nf4: a 4-bit base.
        whole: train all parameters, without adapters.
    """
    import_unsloth()
    from unsloth import FastLanguageModel

    more = {"load_in_4bit": nf4, "use_gradient_checkpointing": checkpointing}
    model = _loaded(FastLanguageModel, folder, seq_len, whole, more)
    if not whole:
        more = {"target_modules": TARGETS, "use_gradient_checkpointing": checkpointing}
        model = FastLanguageModel.get_peft_model(model, **ADAPTERS, **more)
    return model.train()


def unsloth_vision_model(folder: str | Path, seq_len: int, *, whole: bool = False) -> Any:
    """Unsloth's vision-language model in training mode: adapters (r=16) on the language model, a frozen tower.

    Args:
        folder: of a model and its processor.
        whole: train all of the language model, without adapters.
    """
    import_unsloth()
    from unsloth import FastVisionModel

    more = {"load_in_4bit": False, "use_gradient_checkpointing": False}
    model = _loaded(FastVisionModel, folder, seq_len, whole, more)
    if whole:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("visual" not in name)
    else:
        more = {"finetune_vision_layers": False, "use_gradient_checkpointing": False}
        model = FastVisionModel.get_peft_model(model, **ADAPTERS, **more)
    return model.train()


def import_unsloth() -> None:
    """Import it without a network: it looks around when it is imported."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    import_module("unsloth")


def _loaded(kind: Any, folder: str | Path, seq_len: int, whole: bool, more: dict[str, Any]) -> Any:
    """A model by one of Unsloth's classes."""
    model, _ = kind.from_pretrained(
        str(folder),
        max_seq_length=seq_len,
        dtype=torch.bfloat16,
        full_finetuning=whole,
        local_files_only=True,
        **more,
    )
    return model
