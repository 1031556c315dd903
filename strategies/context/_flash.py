"""Torch's flash-attention operators, which give the log-sum-exp of every row too (private names, torch 2.11-2.13).

Blocks of keys attended to one after the other can be merged by their log-sum-exps, and given those over *all* keys the
backward operators return a block's part of the gradients. `scaled_dot_product_attention` itself keeps them to itself.

Source: FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

import torch
from torch import Tensor

Random = tuple[Tensor, Tensor]
"""The state of the dropout that there is none of: CUDA's backward wants it all the same."""


def flash_fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the operators take such queries `[b, h, q, d]`, and keys and values `[b, h_kv, k, d]`."""
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
    """Attention of all queries to all keys, or with as many keys as queries to those up to their own.

    Returns:
        out `[b, h, q, d]`, the log-sum-exp `[b, h, q]` in fp32 (or wider), and what `flash_backward` wants on CUDA.
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
    """What these keys and values contribute to the gradients of queries, keys and values.

    Args:
        grad, out, lse: of the attention to *all* keys, of which these may be some.
    """
    lse = lse.contiguous()
    if query.device.type == "cuda":
        assert random is not None
        lengths = (None, None, query.shape[2], key.shape[2])
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
            grad, query, key, value, out, lse, *lengths, 0.0, causal, *random, scale=scale
        )
    heads = key.shape[1]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, _expand(key, query), _expand(value, query), out.contiguous(), lse, 0.0, causal, scale=scale
    )
    return dq, dk.unflatten(1, (heads, -1)).sum(2), dv.unflatten(1, (heads, -1)).sum(2)


def _expand(tensor: Tensor, query: Tensor) -> Tensor:
    """As many heads as there are of queries: the CPU's operators know no shared ones."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)
