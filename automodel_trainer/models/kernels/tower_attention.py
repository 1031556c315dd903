"""Attention of vision towers that read all pictures of a batch as one sequence.

Such a tower says where pictures, or windows of them, begin (`cu_seqlens`). With `sdpa` transformers cuts the sequence
and calls a kernel for each piece: hundreds of launches a layer where the pieces are windows. FlashAttention (arXiv
2307.08691) takes the whole sequence with its boundaries, and torch has it as `varlen_attn`. Pieces as long as whole
pictures stay apart: the kernel that torch chooses for one piece is faster then.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, MutableMapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from automodel_trainer.models._transformers import attention_of, set_attention
from automodel_trainer.models.kernels.attention import attention_name
from automodel_trainer.nn._torch import version_of

OURS = attention_name("")
NAME = f"{OURS}tower_flash"
"""Transformers gives boundaries to attention with "flash" in its name."""
TITLE = "torch's FlashAttention in one call; pictures that are not cut into windows one by one"
_LONG = 1024
"""Pieces of this mean length are attended to one by one. (benchmarks/vlm.py --attention measures both ways.)"""
_READ: MutableMapping[Tensor, tuple[int | None, list[int]]] = WeakTensorKeyDictionary()
_DEVICE, _DTYPES = "cuda", (torch.bfloat16, torch.float16)


def install_tower_attention(model: PreTrainedModel, device: torch.device) -> bool:
    """Let layers that read several pictures as one sequence attend with one kernel. Returns whether there are any.

    Args:
        model: its attention is chosen. Layers with an attention of the user's choice are left as they are.
        device: where it computes.
    """
    if device.type != _DEVICE or (varlen := _varlen()) is None:
        return False
    AttentionInterface.register(NAME, partial(attend, varlen))
    configs = {id(config): config for config in _configs(model)}
    for config in configs.values():
        set_attention(config, NAME)
    return bool(configs)


def reads_boundaries(block: nn.Module) -> bool:
    """Whether this block is told where pictures begin."""
    return "cu_seqlens" in inspect.signature(type(block).forward).parameters


def attends_in_one_call(block: nn.Module) -> bool:
    """Whether the attention in this block is the one here, so that its graph does not depend on the boundaries."""
    return any(
        attention_of(config) == NAME for module in block.modules() if (config := getattr(module, "config", None))
    )


@torch.compiler.disable
def attend(
    varlen: Callable[..., Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query, key and value `[1, h, s, d]`, boundaries int `[n + 1]`; out `[1, s, h, d]`.

    Compiled blocks are cut here: boundaries would be part of their graphs.
    """
    assert cu_seq_lens_q is not None
    assert max_length_q is not None
    assert attention_mask is None
    fits = query.dtype in _DTYPES and query.device.type == _DEVICE
    if not fits or query.shape[2] >= _LONG * (len(cu_seq_lens_q) - 1):
        return _piece_by_piece(module, query, key, value, cu_seq_lens_q, scaling), None
    bounds, longest = cu_seq_lens_q.to(torch.int32), int(max_length_q)
    flat = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    return varlen(*flat, bounds, bounds, longest, longest, scale=scaling)[None], None


def _piece_by_piece(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None
) -> Tensor:
    pieces = zip(*(tensor.split(_lengths(bounds), dim=2) for tensor in (query, key, value)))
    made = [
        sdpa_attention_forward(module, q, k, v, attention_mask=None, scaling=scaling, is_causal=False)[0]
        for q, k, v in pieces
    ]
    return torch.cat(made, dim=1)


def _lengths(bounds: Tensor) -> list[int]:
    """How long the pieces are. Every layer asks with the same tensor, and only the first waits for the device."""
    version = version_of(bounds)
    known = _READ.get(bounds)
    if known is None or version is None or known[0] != version:
        known = _READ[bounds] = (version, _read(bounds))
    return known[1]


def _read(bounds: Tensor) -> list[int]:
    lengths: list[int] = bounds.diff().tolist()
    return lengths


@cache
def _varlen() -> Callable[..., Tensor] | None:
    """torch's `varlen_attn`; None where it is missing or cannot scale scores as it is asked to."""
    try:
        found: Callable[..., Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return found if "scale" in inspect.signature(found).parameters else None


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs of layers that take boundaries, whose attention is `sdpa` or one that this project chose."""
    text, found = model.config.get_text_config(), []
    for module in model.modules():
        config, size = getattr(module, "config", None), getattr(module, "head_dim", None)
        if config is None or config is text or config is model.config or not isinstance(size, int):
            continue
        fits = size % 8 == 0 and size <= 256 and not getattr(module, "attention_dropout", 0)
        free = attention_of(config) == "sdpa" or attention_of(config).startswith(OURS)
        if fits and free and "cu_seqlens" in inspect.signature(module.forward).parameters:
            found.append(config)
    return found
