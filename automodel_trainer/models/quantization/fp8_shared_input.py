"""Trained linear layers in fp8 ("tensorwise"), compiled: layers that share an input compute its gradient together.

    out_i = x·W_iᵀ        of x = [g_1, g_2, …]·[W_1; W_2; …]        of W_i = g_iᵀ·x

This is one matmul instead of several and a sum. Narrow layers (keys, values) no longer multiply alone, which would
leave half of a GPU idle. One matmul needs one scale, so the weights of a group share a scale, and the gradients of its
outputs share one. Gradients of weights are computed layer by layer: together they were slower (wide layers) or no
faster.

What is cast, and to which format, is the same as in torchao's layers. Code that is not compiled runs torchao's layers,
because every operation here would be a kernel of its own.

Source: torchao.float8; FP8 formats, arXiv 2209.05433.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from automodel_trainer.models.quantization._torchao import fp8_scale, weight_in_fp8
from automodel_trainer.models.quantization.fp8_weight import E4M3, E5M2, MULTIPLE, cast_with, scale_of, side_by_side
from automodel_trainer.nn._torch import scaled_matmul
from automodel_trainer.nn.defer_to_backward import defer_to_backward
from automodel_trainer.nn.mixing import mixed
from automodel_trainer.nn.shared_input import SharedInput


class Fp8Linear(nn.Linear):
    """torchao's layer; in compiled code it computes with its group. Mixed in by `multiply_together`."""

    together: Fp8Group

    def forward(self, x: Tensor) -> Tensor:
        return self.together.output_of(self, x) if self.together.takes(x) else super().forward(x)


def multiply_together(layers: Sequence[nn.Module]) -> None:
    """Make a group of torchao's tensorwise layers that get the same input, in place; names and types stay."""
    for layer in layers:
        layer.__class__ = mixed(Fp8Linear, type(layer))  # type: ignore[arg-type]
    group = Fp8Group(layers)  # type: ignore[arg-type]
    for layer in group.layers:
        layer.together = group


class Fp8Group(SharedInput[Fp8Linear]):
    """Layers that get the same input, in the order in which they run."""

    def takes(self, x: Tensor) -> bool:
        """Whether the group can compute for this input `[..., in]`, here and now."""
        if not torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return False
        weights = [layer.weight for layer in self.layers]
        in_fp8 = [weight_in_fp8(weight) is not None for weight in weights]
        return all(in_fp8 if any(in_fp8) else map(_is_plain, weights)) and {w.dtype for w in weights} == {x.dtype}

    def outputs_of(self, x: Tensor) -> Sequence[Tensor]:
        weights = [layer.weight for layer in self.layers]
        rows = x.flatten(0, -2)
        missing = -len(rows) % MULTIPLE
        outputs = _Matmul.apply(F.pad(rows, (0, 0, 0, missing)) if missing else rows, *_codes(weights), *weights)
        return [out[: len(rows)].unflatten(0, x.shape[:-1]) for out in outputs]


def _is_plain(weight: Tensor) -> bool:
    """A plain tensor, no subclass such as a DTensor."""
    return type(weight) in (Tensor, nn.Parameter)


@torch.no_grad()
def _codes(weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The scale of all weights `[1, 1]`, and the codes `[out, in]` of each."""
    held = [weight_in_fp8(weight) for weight in weights]
    given = [codes for codes in held if codes is not None]
    if given:  # gathered in fp8, all of them with the same scale
        return given[0][1].reciprocal().view(1, 1), tuple(codes for codes, _ in given)
    largest = torch.cat([weight.abs().amax(1) for weight in weights]).amax()
    multiplier = fp8_scale(largest, E4M3)  # the same to the last bit as in a gather in fp8
    codes = tuple((weight.float() * multiplier).to(E4M3) for weight in weights)
    return multiplier.reciprocal().view(1, 1), codes


class _Matmul(torch.autograd.Function):
    """x `[t, in]` -> `[t, out]` of each layer. The weights are arguments only to receive their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, codes: tuple[Tensor, ...], *weights: Tensor) -> Any:
        of_x = scale_of([x], E4M3)
        cast = cast_with(x, of_x, E4M3)
        ctx.save_for_backward(x, of_x, scale, *codes)
        return tuple(scaled_matmul(cast, part.mT, of_x, scale, x.dtype) for part in codes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, of_x, scale, *codes = ctx.saved_tensors
        of_gradient = scale_of(gradients, E5M2)
        parts = [cast_with(gradient, of_gradient, E5M2) for gradient in gradients]
        turned = [defer_to_backward(part.view(torch.uint8), of_gradient).mT.contiguous() for part in codes]
        columns = side_by_side(turned).view(E4M3)
        of_input = scaled_matmul(side_by_side(parts), columns.mT, of_gradient, scale, x.dtype, exact=True)
        # fp8 matmuls take both operands along the dimension that is summed, here the tokens
        inputs = cast_with(x, of_x, E4M3).mT.contiguous()
        of_weights = (
            scaled_matmul(part.mT.contiguous(), inputs.mT, of_gradient, of_x, x.dtype, exact=True) for part in parts
        )
        return of_input, None, None, *of_weights
