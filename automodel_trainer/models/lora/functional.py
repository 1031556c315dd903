"""The arithmetic of low-rank adapters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The update of a linear layer's output.

    Args:
        x: `[..., in]`.
        a: `[rank, in]`.
        b: `[out, rank]`.
        scaling: alpha / rank.

    Returns:
        scaling · x·Aᵀ·Bᵀ, `[..., out]`, in the dtype of the adapter (under autocast: in autocast's).
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # torch raises an error for meta
        x = x.to(a.dtype)
    return F.linear(F.linear(x, a), b) * scaling


def matmul_into(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a `[m, k]` @ b `[k, n]` in `dtype`. On a GPU fp32 results of half-precision inputs are not rounded on the way."""
    if a.is_cuda and dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def expert_factors(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Split PEFT's stacked factors into one adapter per expert.

    Args:
        a: `[experts · rank, in]`, expert by expert.
        b: `[out, rank · experts]`, the expert running fastest.

    Returns:
        `[experts, rank, in]` and `[experts, out, rank]`.
    """
    return a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


def adapted_weight(weight: Tensor, a: Tensor, b: Tensor, scaling: float, transposed: bool = False) -> Tensor:
    """weight + scaling · B·A, for a module that uses its weight in its own code.

    The sum, and in backward its gradient, exist in full while the layer runs. There is no way around that, because we
    do not know what the module does with its weight.

    Args:
        weight: `[out, in]`, or fused experts `[experts, out, in]`, or (`transposed`) `[experts, in, out]`.
        a, b: as `expert_factors` has them.
        scaling: alpha / rank.
        transposed: the experts' layout.
    """
    if weight.ndim == 2:
        return torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype), alpha=scaling)
    a, b = expert_factors(a, b, weight.shape[0])
    left, right = (a.mT, b.mT) if transposed else (b, a)
    return torch.baddbmm(weight, left.to(weight.dtype), right.to(weight.dtype), alpha=scaling)


def merged_linear(weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor | None = None) -> Tensor:
    """The weight of a linear layer with its adapter in it, `[out, in]`.

    Args:
        weight: the base weight, fp32 `[out, in]`.
        a, b: `[rank, in]` and `[out, rank]`.
        scaling: alpha / rank.
        magnitude: DoRA's, `[out]`; None without DoRA.
    """
    merged = adapted_weight(weight, a, b, scaling)
    if magnitude is not None:
        merged *= (magnitude / direction_norm(weight, a, b, scaling))[:, None]
    return merged


def direction_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """‖weight + scaling · B·A‖ of every output row, `[out]`, by which DoRA divides. A constant for autograd (§4.3)."""
    with torch.no_grad():
        dtype = torch.promote_types(weight.dtype, a.dtype)
        update = b.to(dtype) @ a.to(dtype)
        return torch.linalg.vector_norm(weight.to(dtype) + scaling * update, dim=1)
