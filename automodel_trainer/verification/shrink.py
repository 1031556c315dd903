"""A small version of a user's model: same architecture, one layer of each kind, narrow, with the same divisibility."""

from __future__ import annotations

import copy
import math
from typing import Any

from transformers import PreTrainedConfig

HEAD_DIM = 16
MIN_LAYERS = 2
_MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_intermediate_size")


def shrink(
    config: PreTrainedConfig, ranks: int, length: int, vocab_size: int, layers: int = MIN_LAYERS
) -> PreTrainedConfig:
    """A small copy of `config`.

    Sizes that divide by `ranks` (heads, key heads, widths, experts) still do, and the others still do not. So a layout
    that refuses the original refuses the copy. Attention windows are made shorter than `length`, so that they matter.

    Args:
        config: of the user's model; it is not changed.
        ranks: the largest number of ranks that cuts a dimension.
        length: tokens of a row.
        vocab_size: how many token ids the batches use.
        layers: the least number of layers, if the original has so many.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    _shrink_depth(text, max(layers, MIN_LAYERS))
    _shrink_heads(text, ranks)
    for name in _WIDTHS:
        if isinstance(value := getattr(text, name, None), int):
            setattr(text, name, alike(value, 4 * HEAD_DIM, ranks))
    _shrink_experts(text, ranks)
    text.vocab_size = alike(text.vocab_size, max(vocab_size, 4 * HEAD_DIM), ranks)
    for name in ("sliding_window", "attention_chunk_size"):
        if isinstance(value := getattr(text, name, None), int):
            setattr(text, name, min(value, max(2, length // 3)))
    _silence_noise(text)
    text.use_cache = False
    return config


def alike(value: int, least: int, modulus: int) -> int:
    """The smallest number ≥ `least` with the same remainder by `modulus` as `value`, but never more than `value`."""
    return min(value, least + (value - least) % modulus)


def _shrink_depth(config: PreTrainedConfig, layers: int) -> None:
    depth = config.num_hidden_layers
    keep = _one_of_each(_kinds(config, depth), layers)
    per_layer = {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == depth and name != "architectures"
    }
    for name, value in per_layer.items():
        setattr(config, name, [value[i] for i in keep])
    if isinstance(dense := getattr(config, "first_k_dense_replace", None), int):
        config.first_k_dense_replace = min(dense, 1)
    if getattr(config, "mlp_only_layers", None):
        config.mlp_only_layers = [new for new, old in enumerate(keep) if old in config.mlp_only_layers]
    config.num_hidden_layers = len(keep)


def _kinds(config: PreTrainedConfig, depth: int) -> list[Any]:
    """The kind of each layer. Layers of equal kind have the same architecture."""
    types = getattr(config, "layer_types", None) or [None] * depth
    mlps = getattr(config, "mlp_layer_types", None) or [None] * depth
    dense = getattr(config, "first_k_dense_replace", None) or 0
    only = getattr(config, "mlp_only_layers", None) or []
    return [(types[i], mlps[i], i < dense, i in only) for i in range(depth)]


def _one_of_each(kinds: list[Any], layers: int) -> list[int]:
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    more = [i for i in range(len(kinds)) if i not in first]
    return sorted(first + more[: max(0, layers - len(first))])


def _shrink_heads(config: PreTrainedConfig, ranks: int) -> None:
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    rotary = getattr(config, "head_dim", None) or config.hidden_size // heads
    small_keys, groups = _heads(heads, key_heads, ranks)
    latent = getattr(config, "kv_lora_rank", None) is not None
    if latent:
        for name, size in _MLA.items():
            if getattr(config, name, None) is not None:
                setattr(config, name, size)
    config.num_attention_heads = small_keys * groups
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = small_keys
    if getattr(config, "head_dim", None) is not None:
        config.head_dim = _MLA["qk_rope_head_dim"] if latent else HEAD_DIM
    config.hidden_size = HEAD_DIM * config.num_attention_heads
    _shrink_rope(config, rotary // 2, HEAD_DIM // 2)


def _heads(heads: int, key_heads: int, ranks: int) -> tuple[int, int]:
    """Numbers of key heads and of query heads per key head: small, and with the original's divisors among `ranks`'."""
    sizes = [n for n in range(1, ranks + 1) if ranks % n == 0]

    def same(small: int, large: int) -> bool:
        return all((small % n == 0) == (large % n == 0) for n in sizes)

    options = [
        (k, g)
        for k in range(min(2, key_heads), key_heads + 1)
        for g in range(min(2, heads // key_heads), heads // key_heads + 1)
        if same(k, key_heads) and same(k * g, heads)
    ]
    return min(options, key=math.prod)


def _shrink_rope(config: PreTrainedConfig, old: int, new: int) -> None:
    """Shorten the lists of frequency factors, one for each rotary dimension, that some configs have."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None)
        for parameters in [rope, *rope.values()] if isinstance(rope, dict) else []:
            if isinstance(parameters, dict):
                for key, value in parameters.items():
                    if isinstance(value, list) and len(value) == old:
                        parameters[key] = value[:new]


def _shrink_experts(config: PreTrainedConfig, ranks: int) -> None:
    chosen = getattr(config, "num_experts_per_tok", None)
    if chosen:
        config.num_experts_per_tok = chosen = min(chosen, 2)
    for name in ("n_group", "topk_group"):
        if getattr(config, name, None):
            setattr(config, name, 1)
    for name in _EXPERTS:
        if isinstance(value := getattr(config, name, None), int) and value > 1:
            setattr(config, name, alike(value, max(4, chosen or 1), ranks))


def _silence_noise(config: PreTrainedConfig) -> None:
    """Turn off dropout and router noise: every process draws its own, so runs could not be compared."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and any(word in name for word in ("dropout", "drop_path", "pdrop", "jitter")):
            setattr(config, name, 0.0)
