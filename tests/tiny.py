"""Tiny tokenizers and models that every test shares. Nothing here touches the network."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>"]


def tiny_tokenizer(chat_template: str | None = CHATML, **kwargs: object) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (256 bytes + special tokens, no merges): every text round-trips exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    defaults = {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<|im_start|>"],
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{**defaults, **kwargs})
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(model_type: str = "llama", **overrides: object) -> PreTrainedConfig:
    """A 2-layer config of any decoder family, narrow enough for milliseconds."""
    sizes = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 4,
    }
    return AutoConfig.for_model(model_type, **{**sizes, **overrides})


def tiny_model(model_type: str = "llama", seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A randomly initialised fp32 model; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), dtype=torch.float32)


def save_tiny_model(folder: Path) -> None:
    """A model and its tokenizer, as pages, examples and configurations expect them."""
    tiny_model(tie_word_embeddings=True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def write_chats(file: Path, count: int) -> None:
    """A file of `count` equal chats of two turns."""
    turns = [{"role": "user", "content": "what is two plus two?"}, {"role": "assistant", "content": "it is four"}]
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(count)))
