"""Grouped matmuls of experts in fp8.

Rows of both operands have a scale of their own, which is what torch's grouped matmul takes. Trained weights are cast in
every forward and backward, once for each direction of the sum; their gradients are computed from what was not cast. The
frozen weights under adapters are held in fp8 (`models/quantization/fp8_weight.py`): a scale that belongs to what is
summed is multiplied into the other operand before that is cast.

Source: FP8 formats, arXiv 2209.05433.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from automodel_trainer.models.quantization.fp8_weight import E4M3, cast_with, scale_of
from automodel_trainer.models.quantization.quantized_tensor import QuantizedTensor
from automodel_trainer.nn._torch import grouped_outer, scaled_grouped_matmul
from automodel_trainer.nn.defer_to_backward import defer_to_backward


def cast_to_fp8(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """Rows of x `[s, in]` through their expert's weight, both cast to fp8: `[s, out]` in the dtype of x.

    Args:
        weight: `[experts, out, in]`, or `transposed` `[experts, in, out]`.
        ends: int32 `[experts]`, the end of each expert's rows.
    """
    return _Cast.apply(x, weight, ends, transposed)  # type: ignore[no-any-return]


def held_in_fp8(x: Tensor, weight: QuantizedTensor, ends: Tensor, expert: Tensor, transposed: bool) -> Tensor:
    """`cast_to_fp8` with a frozen weight that is held in fp8, a scale for each row of its last dimension.

    Args:
        expert: `[s]`, the expert of each row.
    """
    codes, scales = weight.parts.codes.view(weight.shape), weight.parts.scales.view(weight.shape[:2])
    return _Held.apply(x, codes, scales, ends, expert, transposed)  # type: ignore[no-any-return]


class _Cast(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.transposed = transposed
        return _through(x, weight.mT if transposed else weight, ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, ends = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _through(grad, weight if ctx.transposed else weight.mT, ends)
        if ctx.needs_input_grad[1]:
            a, b = (x, grad) if ctx.transposed else (grad, x)
            of_weight = grouped_outer(a, b, ends)
        return of_x, of_weight, None, None


def _through(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x `[s, k]` times weight `[experts, n, k]`, cast here: `[s, n]`."""
    scales = scale_of([weight], E4M3, by_row=True)
    codes = cast_with(weight, scales, E4M3).contiguous()
    rows, of_rows = _rows(x)
    return scaled_grouped_matmul(rows, codes.mT, of_rows, scales[..., 0].contiguous(), ends, x.dtype)


class _Held(Function):
    """Codes uint8 `[experts, r, c]` with scales `[experts, r]`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, ends: Tensor, expert: Tensor, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, ends, expert)
        ctx.transposed = transposed
        return (_over_rows if transposed else _to_rows)(x, codes, scales, ends, expert)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        codes, scales, ends, expert = ctx.saved_tensors
        product = _to_rows if ctx.transposed else _over_rows
        return product(grad, defer_to_backward(codes, grad), scales, ends, expert), None, None, None, None, None


def _to_rows(x: Tensor, codes: Tensor, scales: Tensor, ends: Tensor, expert: Tensor) -> Tensor:
    """x `[s, c]` to `[s, r]`: each row of the weight makes a number."""
    rows, of_rows = _rows(x)
    return scaled_grouped_matmul(rows, codes.view(E4M3).mT, of_rows, scales, ends, x.dtype)


def _over_rows(x: Tensor, codes: Tensor, scales: Tensor, ends: Tensor, expert: Tensor) -> Tensor:
    """x `[s, r]` to `[s, c]`: a sum over the rows of the weight, so their scales go with x."""
    rows, of_rows = _rows(x * scales[expert])
    columns = codes.mT.contiguous().view(E4M3).mT  # matmuls in fp8 take their second operand by columns
    ones = scales.new_ones(codes.shape[0], codes.shape[2])
    return scaled_grouped_matmul(rows, columns, of_rows, ones, ends, x.dtype)


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[s, n]` as codes `[s, n]` and scales fp32 `[s]`."""
    scales = scale_of([x], E4M3, by_row=True)
    return cast_with(x, scales, E4M3), scales[:, 0].contiguous()
