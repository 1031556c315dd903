"""torch's variable-length attention, whose signature changed from 2.11 to 2.13."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_KNOWN = inspect.signature(varlen_attn).parameters


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention within each of several documents that lie one after the other (FlashAttention, CUDA only).

    Args:
        query: `[n, h, d]`, bf16 or fp16.
        key, value: `[n, h_kv, d]`, with h a multiple of h_kv.
        boundaries: int32 `[documents + 1]`, from 0 to n.
        longest: no document has more tokens.
        scale: of the scores; None: 1/√d.
        window: tokens that a query sees, itself included; None: all before it.

    Returns:
        `[n, h, d]`.
    """
    options: dict[str, Any] = {"scale": scale} if "scale" in _KNOWN else {}
    if "scale" not in _KNOWN and scale is not None:
        query = query * (scale * math.sqrt(query.shape[-1]))
    if "window_size" in _KNOWN:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is not None and window < longest:
        raise ValueError("attention='varlen' has no sliding windows in this torch. Use attention='sdpa'.")
    else:
        options["is_causal"] = True
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in _KNOWN:
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    return varlen_attn(query, key, value, boundaries, boundaries, longest, longest, **options)  # type: ignore
