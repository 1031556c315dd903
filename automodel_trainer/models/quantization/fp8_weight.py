"""A frozen weight held in fp8: it is cast once, and the matmuls of forward and backward use the same codes.

Every output row of the weight has its own scale ("rowwise"), or all rows share one ("tensorwise"). In backward a
rowwise scale belongs to the dimension that is summed, where a matmul takes no scale. So the gradient is multiplied with
it before it is cast.

Source: FP8 formats, arXiv 2209.05433.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from automodel_trainer.models.quantization.nf4 import QuantizedParts, deferred
from automodel_trainer.nn._torch import scaled_matmul
from automodel_trainer.nn.defer_to_backward import defer_to_backward

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCHEMES = ("fp8-rowwise", "fp8-tensorwise")
MULTIPLE = 16  # both sides of a weight, and the tokens that its gradient sums over, must be a multiple of it


def quantize(weight: Tensor, scheme: str) -> QuantizedParts:
    """A dense weight `[out, in]` as codes (one byte an element) and scales fp32 `[out]`.

    The rows of several matrices `[n, out, in]` are held as those of one, `[n · out, in]`.

    A tensorwise scale is a power of two. Weights that must share a scale then take the largest of theirs: that only
    changes the exponents of their codes, and rounds nothing again.
    """
    weight = weight.flatten(0, -2)
    scales = scale_of([weight], E4M3, _by_row(scheme))
    scales = scales if _by_row(scheme) else scales.log2().ceil().exp2()
    codes = cast_with(weight, scales, E4M3)
    none = weight.new_empty(0, dtype=torch.float32)
    return QuantizedParts(
        codes.view(torch.uint8), scales.expand(weight.shape[0], 1)[:, 0].contiguous(), none, none, none
    )


def dequantize(parts: QuantizedParts, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
    """The dense weight `[out, in]`; see `nf4.deferred` for `after`."""
    parts = deferred(parts, after)
    return (parts.codes.view(E4M3).float() * parts.scales[:, None]).to(dtype)


def linear(x: Tensor, parts: QuantizedParts, scheme: str) -> Tensor:
    """x `[..., in]` times a weight held in fp8: `[..., out]`, in x's dtype. The weight has no gradient."""
    out: Tensor = _Linear.apply(x, parts.codes, parts.scales, _by_row(scheme))
    return out


def _by_row(scheme: str) -> bool:
    return scheme == "fp8-rowwise"


class _Linear(torch.autograd.Function):
    """See `linear`; codes `[out, in]`, scales `[out]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, by_row: bool) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.by_row = by_row
        cast, of_x = _cast(x.flatten(0, -2), E4M3, by_row)
        of_weight = scales[None] if by_row else scales[:1, None]
        out = scaled_matmul(cast, codes.view(E4M3).mT, of_x, of_weight, x.dtype)
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        codes, scales = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        if ctx.by_row:  # Σ g·s·w over the outputs: s belongs to what is summed
            cast, of_gradient = _cast(rows * scales, E4M3, by_row=True)
            of_weight = scales.new_ones(1, codes.shape[1])
        else:
            cast, of_gradient = _cast(rows, E5M2, by_row=False)
            of_weight = scales[:1, None]
        # fp8 matmuls take their second operand by columns
        columns = defer_to_backward(codes, gradient).mT.contiguous().view(E4M3).mT
        out = scaled_matmul(cast, columns, of_gradient, of_weight, gradient.dtype)
        return out.unflatten(0, gradient.shape[:-1]), None, None, None


def scale_of(parts: Sequence[Tensor], dtype: torch.dtype, by_row: bool = False) -> Tensor:
    """The scale that turns codes back into values, for a matrix whose parts `[..., rows, n]` lie side by side.

    Args:
        dtype: of the codes.
        by_row: every row has its own scale.

    Returns:
        fp32 `[..., 1, 1]`, or `[..., rows, 1]`.
    """
    # first by row: the compiler can do that in the pass that computes the part
    largest = reduce(torch.maximum, [part.abs().amax(dim=-1, keepdim=True) for part in parts])
    largest = largest if by_row else largest.amax(dim=-2, keepdim=True)
    return largest.float().clamp(min=1e-12) / torch.finfo(dtype).max


def cast_with(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of x, for a scale at which all of x fits into `dtype`.

    There is no clamp, and the code multiplies by the reciprocal. A clamp and a division together were a quarter of the
    instructions of SwiGLU's backward with its cast, which is compute-bound.
    """
    return (x.float() * scale.reciprocal()).to(dtype)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Codes `[rows, …]` of several parts as one matrix."""
    return torch.cat([part.view(torch.uint8) for part in parts], 1).view(parts[0].dtype)


def _cast(x: Tensor, dtype: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    """x `[rows, n]` as codes `[rows, n]` and scales `[rows, 1]` or `[1, 1]`."""
    scale = scale_of([x], dtype, by_row)
    return cast_with(x, scale, dtype), scale
