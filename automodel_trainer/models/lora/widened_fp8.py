"""One fp8 matmul for frozen weights that share an input and for their adapters: `widened`, with one scale for all.

The weights are S·codes, B is b·codes, A is a·codes. One matmul has one scale on each side; that of the weights is S,
and b and a go into the other side before that is cast:

    out = S·([x, xa]·[W, B] in codes)        xa = scaling·b/S · A·x
    of x = S·([g, ga]·[W; A] in codes)       ga = scaling·a/S · Bᵀ·g

The gradients of A and B are computed from numbers that were not cast. An update is as exact as the weight is: to three
bits of mantissa.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from automodel_trainer.models._torch import scaled_matmul
from automodel_trainer.models.fp8_weight import E4M3, E5M2, cast_with, scale_of
from automodel_trainer.models.lora.layers import LoRALinear
from automodel_trainer.models.lora.widened import ALIGNMENT, WidenedGroup, multiply_beside, places, with_room
from automodel_trainer.models.packed_tensor import PackedTensor
from automodel_trainer.models.unchanged import weights_are_unchanged

# Numbers of fp32 that a scale's place is a multiple of: compiled code copies inputs that do not begin at 16 bytes.
_ALIGNED = 4


class WidenedFp8(WidenedGroup):
    """Weights held in fp8 ("tensorwise"), as one matrix of codes that is laid out as `WidenedDense`'s.

    Their adapters must have no dropout.
    """

    scale: Tensor  # S, `[1, 1]`
    down: Tensor  # this and the next: see `_border`
    up: Tensor
    of_a: Tensor
    of_b: Tensor

    def __init__(self, layers: Sequence[LoRALinear], groups: list[WidenedFp8] | None = None) -> None:
        """groups: the model's, to which this one is added."""
        super().__init__(layers)
        self.groups = [] if groups is None else groups
        self.groups.append(self)
        self.columns = self.rank + -self.rank % ALIGNMENT
        shape = (self.outputs + self.columns, self.inputs + self.columns)
        self.codes = torch.zeros(shape, dtype=torch.uint8, device=self.layers[0].weight.device)
        self._hold_weights()

    def take_in(self) -> None:
        _take_in([self, *self._others_due()])

    def _others_due(self) -> Sequence[WidenedFp8]:
        """Groups of other blocks, where their factors can be seen from here: FSDP2 may have to gather them first."""
        if not weights_are_unchanged() or not self.groups[-1].has_whole_factors():
            return []
        return [g for g in self.groups if g is not self and g.has_whole_factors() and g.once.due()]

    def has_whole_factors(self) -> bool:
        return all(map(_is_whole, self.factors()))

    def follow_weights(self) -> None:
        """Weights that were moved or replaced."""
        held = [self.codes[rows, : self.inputs].data_ptr() for rows, _ in places(self.sizes)]
        if any(pointer != _packed(layer).parts.codes.data_ptr() for pointer, layer in zip(held, self.layers)):
            self.codes = self.codes.to(self.layers[0].weight.device)
            self._hold_weights()

    @torch.no_grad()
    def _hold_weights(self) -> None:
        """Take the weights in with one scale for all, and make them parts of the storage."""
        self.scale = torch.stack([_packed(layer).parts.scales[0] for layer in self.layers]).amax().view(1, 1)
        for (rows, _), layer in zip(places(self.sizes), self.layers):
            weight = _packed(layer)
            numbers = weight.parts.codes.view(E4M3).float() * weight.parts.scales[0]
            codes = self.codes[rows, : self.inputs].copy_(cast_with(numbers, self.scale, E4M3).view(torch.uint8))
            parts = replace(weight.parts, codes=codes, scales=self.scale[0].expand(len(codes)).clone())
            held = PackedTensor(parts, weight.packing, weight.shape, weight.dtype)
            layer.weight = nn.Parameter(held, requires_grad=False)

    def outputs_of(self, x: Tensor) -> Sequence[Tensor]:
        outputs = _Matmul.apply(
            x.flatten(0, -2), self.codes, self.scale, self.down, self.up, self.of_a, self.of_b, self.sizes,
            *self.factors(),
        )  # fmt: skip
        return [out.unflatten(0, x.shape[:-1]) for out in outputs]


def _packed(layer: LoRALinear) -> PackedTensor:
    weight: Any = layer.weight
    assert isinstance(weight, PackedTensor)
    return weight


@torch.no_grad()
def _take_in(groups: Sequence[WidenedFp8]) -> None:
    """`take_in` for all of them: as many calls as there are groups would keep the device waiting for the host."""
    alike: dict[Any, list[WidenedFp8]] = {}
    for group in groups:
        group.follow_weights()
        scalings = tuple(layer.scaling for layer in group.layers)
        kind = group.inputs, group.sizes, scalings, group.layers[0].weight.dtype, group.codes.device
        alike.setdefault(kind, []).append(group)
    for (_, sizes, scalings, dtype, device), members in alike.items():
        border = _border if device.type == "cpu" else _compiled_border()
        factors = [torch.stack([_local(f) for f in same]).to(dtype) for same in zip(*(g.factors() for g in members))]
        scales = torch.stack([group.scale for group in members])
        for group, *parts in zip(members, *border(scales, sizes, scalings, members[0].columns, *factors)):
            group.down, group.up, group.of_a, group.of_b, of_rows, of_columns = parts
            group.codes[group.outputs :, : group.inputs].copy_(of_rows)
            group.codes[: group.outputs, group.inputs :].copy_(of_columns)


def _is_whole(factor: Tensor) -> bool:
    """No part of it is with another rank."""
    if not isinstance(factor, DTensor):
        return True
    return all(size == 1 or p.is_replicate() for size, p in zip(factor.device_mesh.shape, factor.placements))


def _local(factor: Tensor) -> Tensor:
    return factor.to_local() if isinstance(factor, DTensor) else factor


def _border(scale: Tensor, sizes: Any, scalings: Any, columns: int, *factors: Tensor) -> tuple[Tensor, ...]:
    """What of groups that are alike changes with their factors.

    Args:
        scale: S of each group, `[groups, 1, 1]`.
        factors: A `[groups, rank, in]` and B `[groups, out, rank]` of every layer.

    Returns:
        of each group: what x `[t, in]` and the gradient `[t, out]` are multiplied with for the codes beside them,
        `[columns, in]` and `[out, columns]`; what the gradients of each A and B have to be multiplied with,
        `[layers, 1]` and no further rows of use; and the codes of As `[columns, in]` and Bs `[out, columns]`.
    """
    as_, bs, layers = factors[0::2], factors[1::2], len(sizes) + -len(sizes) % _ALIGNED
    scales_a, scales_b = ([scale_of(factor, E4M3) for factor in part] for part in (as_, bs))
    down = [(a.float() * (s * of_b / scale)).to(a.dtype) for a, of_b, s in zip(as_, scales_b, scalings)]
    up = [(b.float() * (s * of_a / scale)).to(b.dtype) for b, of_a, s in zip(bs, scales_a, scalings)]
    rows = [cast_with(a, of_a, E4M3).view(torch.uint8) for a, of_a in zip(as_, scales_a)]
    blocks = [cast_with(b, of_b, E4M3).view(torch.uint8) for b, of_b in zip(bs, scales_b)]
    return (
        _below(down, columns),
        _diagonal(up, columns),
        _below([scale / of_a for of_a in scales_a], layers),
        _below([scale / of_b for of_b in scales_b], layers),
        _below(rows, columns),
        _diagonal(blocks, columns),
    )


def _below(parts: Sequence[Tensor], rows: int) -> Tensor:
    """One below the other, `[groups, rows, n]`."""
    return F.pad(torch.cat(list(parts), 1), (0, 0, 0, rows - sum(part.shape[1] for part in parts)))


def _diagonal(parts: Sequence[Tensor], columns: int) -> Tensor:
    """Each below the last and to its right, `[groups, n, columns]`."""
    ends = list(accumulate(part.shape[2] for part in parts))
    return torch.cat([F.pad(part, (end - part.shape[2], columns - end)) for part, end in zip(parts, ends)], 1)


@cache
def _compiled_border() -> Any:
    """`_border` in a few kernels, and not in some thirty for every layer."""
    return torch.compile(_border, dynamic=False)


class _Matmul(torch.autograd.Function):
    """x `[t, in]` -> `[t, out]` of each layer. Names are those of `WidenedFp8`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, down: Tensor, up: Tensor, of_a: Tensor,
        of_b: Tensor, sizes: Any, *factors: Tensor,
    ) -> Any:  # fmt: skip
        ctx.sizes, inputs, outputs = sizes, x.shape[1], up.shape[0]
        both = with_room([x], down.shape[0])
        xa = multiply_beside(both, down, inputs)
        of_x = torch.maximum(scale_of(x, E4M3), scale_of(xa, E4M3))
        cast = cast_with(both, of_x, E4M3)
        out = scaled_matmul(cast, codes[:outputs].view(E4M3).mT, of_x, scale, x.dtype)
        ctx.save_for_backward(x, xa, codes, scale, up, of_a, of_b)
        return out.split([out for out, _ in sizes], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, xa, codes, scale, up, of_a, of_b = ctx.saved_tensors
        inputs, outputs = x.shape[1], up.shape[0]
        both = with_room(gradients, xa.shape[1])
        beside = multiply_beside(both, up.mT, outputs)
        of_gradient = torch.stack([scale_of(part, E5M2) for part in (*gradients, beside)]).amax(0)
        cast = cast_with(both, of_gradient, E5M2)
        # fp8 matmuls take their second operand by columns.
        columns = codes[:, :inputs].mT.contiguous().view(E4M3).mT
        of_x = scaled_matmul(cast, columns, of_gradient, scale, x.dtype)
        as_ = beside.mT @ x
        of_factors = []
        for index, (rows, ranks) in enumerate(places(ctx.sizes)):
            of_factors.append(as_[ranks] * of_a[index])
            of_factors.append((both[:, rows].mT @ xa[:, ranks]) * of_b[index])
        return of_x, None, None, None, None, None, None, None, *of_factors
