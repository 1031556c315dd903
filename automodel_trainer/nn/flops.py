"""Floating-point operations per trained token, and the peak rate of a device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from automodel_trainer.nn.experts import CHOICES, COUNTS, share_of_tokens
from automodel_trainer.nn.towers import towers_of

# Peak dense FLOP/s of the matrix units for bf16 with fp32 accumulation (fp16 on devices without bf16), keyed by the
# name that `torch.cuda.get_device_name` returns. Source: the vendors' data sheets; figures given "with sparsity" are
# halved. "H100" alone is the SXM part.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "RTX A6000": 155e12,
    "V100 PCIE": 112e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI355X": 2500e12,
    "MI350X": 2300e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,  # per die: torch sees each of its two dies as a device
}


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a device; None for a CPU or a GPU that is not in `PEAK_FLOPS`."""
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU by its name; None if it is not in `PEAK_FLOPS`."""
    for known in sorted(PEAK_FLOPS, key=len, reverse=True):  # longest first: "H100 PCIe" before "H100"
        words = r"\W.*".join(re.escape(word) for word in known.split())  # "H100 PCIe" is "NVIDIA H100 80GB PCIe" too
        if re.search(rf"(?<![A-Za-z0-9]){words}(?![A-Za-z0-9])", name):
            return PEAK_FLOPS[known]
    return None


def flops_per_token(model: nn.Module, seq_len: float, causal: bool = True) -> float:
    """FLOPs of forward and backward for one token, without recomputation (the count that defines MFU).

    For each token, every element of a matmul weight costs 2 FLOPs in forward, 2 for the gradient of the input, and 2
    for the gradient of the weight if it is trained. That makes 6 for a trained weight, 4 for a frozen one (as with
    LoRA), and 2 for the frozen weights before the first trained one, which the backward never reaches. Every weight
    with two or more dimensions counts, except lookup tables (`nn.Embedding`). The head counts, tied or not. In a
    mixture of experts, as many of the experts count as a token chooses. A vision tower does not count: it computes
    patches, not tokens (`TowerWork` counts them).

    Attention costs `2 · heads · (qk_dim + v_dim)` per layer, token and attended key in forward, and twice that in
    backward. A causal token attends to `(seq_len + 1) / 2` keys on average, and at most to the sliding window.

    Source: PaLM, arXiv 2204.02311, appendix B (`6N + 12·L·H·Q·T`). Unlike PaLM, we do not count the masked half of
    causal attention, and we count frozen weights separately.

    Args:
        model: a transformers model, or a module that contains one. Sharded parameters count in full, and so do the
            parameters of other ranks' pipeline stages.
        seq_len: tokens of a document. For packed rows, `2 · mean(position_ids) + 1` gives the exact attention cost.
        causal: False counts attention to all `seq_len` keys.
    """
    cost = model.__dict__.get(_ATTRIBUTE) or _training_cost(model)
    return cost.matmuls + (1 + 2 * cost.reached) * _attention_flops(cost.sizes, seq_len, causal)


def keep_training_cost(model: nn.Module) -> None:
    """Record the cost of the whole `model`, so that `flops_per_token` is right after it is split into stages."""
    object.__setattr__(model, _ATTRIBUTE, _training_cost(model))


@dataclass(frozen=True)
class _TrainingCost:
    """The facts about a model that `flops_per_token` needs."""

    matmuls: float  # FLOPs of all matmuls for one token, forward and backward
    reached: float  # share of the layers that the backward reaches
    sizes: dict[str, Any]  # config values that attention depends on


_ATTRIBUTE = "_training_cost"


def _training_cost(model: nn.Module) -> _TrainingCost:
    sizes = _text_config(model)
    weights = list(_matmul_weights(model, sizes))
    first = next((index for index, (weight, _) in enumerate(weights) if weight.requires_grad), len(weights))
    if any(p.requires_grad for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()):
        first = -1  # a trained embedding comes before all matmuls: the backward goes through every one of them
    total = 0.0
    for index, (weight, share) in enumerate(weights):
        forward, input_gradient, weight_gradient = 1, index > first, weight.requires_grad
        total += 2 * (forward + input_gradient + weight_gradient) * share * weight.numel()
    # Attention has a backward only in the layers that the backward reaches. The last weight is the head, not a layer.
    body = max(1, len(weights) - 1)
    reached = (body - max(0, first)) / body if first < body else 0.0
    return _TrainingCost(total, reached, sizes)


def holds_language_model(model: nn.Module) -> bool:
    """Whether `model` is or contains a transformers model, so that `flops_per_token` knows its sizes."""
    return bool(_text_config(model))


def _matmul_weights(model: nn.Module, config: dict[str, Any]) -> Iterator[tuple[Tensor, float]]:
    """Every matmul weight with the share of tokens that use it (below 1 for experts), in module order."""
    experts = next((n for n in map(config.get, COUNTS) if n), None)
    chosen = next((n for n in map(config.get, CHOICES) if n), None) or experts
    active = chosen / experts if chosen and experts else 1.0
    inside_experts = _modules_of_expert_lists(model, experts)
    beside = {id(module) for tower in towers_of(model) for module in tower.modules()}
    for module in model.modules():
        if isinstance(module, nn.Embedding) or (beside and id(module) in beside):
            continue
        for _, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if weight.ndim >= 2:
                stacked = share_of_tokens(module, weight, experts, chosen) if experts and chosen else 1.0
                yield weight, active if id(module) in inside_experts else stacked


def _modules_of_expert_lists(model: nn.Module, experts: int | None) -> set[int]:
    """Ids of the modules inside experts, for models that keep experts as a list instead of one stacked weight."""
    if experts is None:
        return set()
    lists = [
        m
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == experts and name.endswith("experts")
    ]
    return {id(module) for one in lists for module in one.modules()}


def _attention_flops(config: dict[str, Any], seq_len: float, causal: bool) -> float:
    """Forward FLOPs per token of the attention scores and their product with the values, summed over all layers."""
    heads, layers = config.get("num_attention_heads"), config.get("num_hidden_layers")
    if not heads or not layers:
        return 0.0
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    width = (config.get("qk_head_dim") or head_dim) + (config.get("v_head_dim") or head_dim)
    window = config.get("sliding_window")
    kinds = config.get("layer_types") or ["sliding_attention" if window else "full_attention"] * layers
    keys = sum(_keys_per_token(kind, seq_len, window, causal) for kind in kinds)
    return 2 * heads * width * keys


def _keys_per_token(kind: str, seq_len: float, window: int | None, causal: bool) -> float:
    if "attention" not in kind or "linear" in kind:
        return 0.0
    if not causal:
        return seq_len
    if kind == "sliding_attention" and window and window < seq_len:
        return window - window * (window - 1) / (2 * seq_len)  # the first `window` tokens see fewer keys
    return (seq_len + 1) / 2


def _text_config(model: nn.Module) -> dict[str, Any]:
    """Sizes of the language model inside `model`, under the names of transformers' configs; empty if there is none."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "get_text_config"):
            text = config.get_text_config()  # type: ignore[union-attr, operator]
            apart = getattr(text, "per_layer_attributes", None) or ()
            return {name: _mean(text, name) if name in apart else getattr(text, name, None) for name in _SIZES}
    return {}


def _mean(text: Any, name: str) -> float:
    """The mean over layers of a size that each has of its own, and that their config lets nobody read as one."""
    layers = range(text.num_hidden_layers)
    return sum(getattr(text.per_layer_config[layer], name) for layer in layers) / len(layers)


_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_head_dim",
    "v_head_dim",
    "layer_types",
    "sliding_window",
    *COUNTS,
    *CHOICES,
)
