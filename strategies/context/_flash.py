"""Torch's flash-attention operators, which also return the log-sum-exp of every row (private names, torch 2.11-2.13).

With the log-sum-exps, the results for several blocks of keys can be merged. Given the log-sum-exps over *all* keys, the
backward operators return one block's part of the gradients. `scaled_dot_product_attention` does not return them.

Source: FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

import torch
from torch import Tensor

Random = tuple[Tensor, Tensor]
"""Seed and offset of the dropout's random generator. We use no dropout, but CUDA's backward needs them anyway."""


def flash_fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the operators support these queries `[b, h, q, d]`, keys and values `[b, h_kv, k, d]`."""
    d = query.shape[-1]
    if not (d == key.shape[-1] == value.shape[-1]) or query.dtype != value.dtype:
        return False
    if query.device.type == "cuda":
        half = query.dtype in (torch.float16, torch.bfloat16)
        return half and d % 8 == 0 and d <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return query.device.type == "cpu" and query.is_floating_point()


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Random | None]:
    """Attention of queries to one block of keys.

    Args:
        query: `[b, h, q, d]`.
        key, value: `[b, h_kv, k, d]`.
        causal: each query sees the keys up to its own index (then k equals q); otherwise it sees all keys.
        scale: factor on the scores.

    Returns:
        out `[b, h, q, d]`, the log-sum-exp `[b, h, q]` in fp32 (or wider), and on CUDA the `random` argument of
        `flash_backward`.
    """
    if query.device.type == "cuda":
        out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return out, lse, (seed, offset)
    key, value = _expand(key, query), _expand(value, query)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return out, lse, None


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    random: Random | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The contribution of one block of keys and values to the gradients of queries, keys and values.

    Args:
        grad: gradient of `out`, `[b, h, q, d]`.
        query: `[b, h, q, d]`.
        key, value: `[b, h_kv, k, d]`, one block.
        out, lse: the result of attention to *all* keys, `[b, h, q, d]` and `[b, h, q]`.
        causal, scale: as in `flash_forward`.
        random: from `flash_forward`.

    Returns:
        gradients in the shapes of `query`, `key` and `value`.
    """
    lse = lse.contiguous()
    if query.device.type == "cuda":
        assert random is not None
        lengths = (None, None, query.shape[2], key.shape[2])
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
            grad, query, key, value, out, lse, *lengths, 0.0, causal, *random, scale=scale
        )
    heads = key.shape[1]
    # The gradient of a key head is the sum over the query heads that share it.
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, _expand(key, query), _expand(value, query), out.contiguous(), lse, 0.0, causal, scale=scale
    )
    return dq, dk.unflatten(1, (heads, -1)).sum(2), dv.unflatten(1, (heads, -1)).sum(2)


def _expand(tensor: Tensor, query: Tensor) -> Tensor:
    """Repeat key heads `[b, h_kv, k, d]` to `[b, h, k, d]`: the CPU operators do not support grouped queries."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)
