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
from automodel_trainer.models.lora.functional import matmul_into
from automodel_trainer.models.lora.layers import LoRALinear
from automodel_trainer.models.lora.widened import ALIGNMENT, WidenedGroup, places
from automodel_trainer.models.packed_tensor import PackedTensor
from automodel_trainer.models.unchanged import weights_are_unchanged


class WidenedFp8(WidenedGroup):
    """Weights held in fp8 ("tensorwise"), one below the other, by rows and by columns.

    Units for fp8 take both operands along what is summed: held once, weights would have to be transposed in every
    backward. Adapters must have no dropout.
    """

    codes: Tensor  # [W, B], `[out, in + columns]`
    transposed: Tensor  # [W; A]ᵀ, `[in, out + columns]`
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
            self._hold_weights()

    @torch.no_grad()
    def _hold_weights(self) -> None:
        """Take the weights in with one scale for all, and make them parts of `codes`."""
        device = self.layers[0].weight.device
        self.codes = torch.empty(self.outputs, self.inputs + self.columns, dtype=torch.uint8, device=device)
        self.transposed = self.codes.new_empty(self.inputs, self.outputs + self.columns)
        self.scale = torch.stack([_packed(layer).parts.scales[0] for layer in self.layers]).amax().view(1, 1)
        for (rows, _), layer in zip(places(self.sizes), self.layers):
            weight = _packed(layer)
            numbers = weight.parts.codes.view(E4M3).float() * weight.parts.scales[0]
            codes = self.codes[rows, : self.inputs].copy_(cast_with(numbers, self.scale, E4M3).view(torch.uint8))
            parts = replace(weight.parts, codes=codes, scales=self.scale[0].expand(len(codes)).clone())
            held = PackedTensor(parts, weight.packing, weight.shape, weight.dtype)
            layer.weight = nn.Parameter(held, requires_grad=False)
        self.transposed[:, : self.outputs] = self.codes[:, : self.inputs].mT

    def outputs_of(self, x: Tensor) -> Sequence[Tensor]:
        outputs = _Matmul.apply(
            x.flatten(0, -2), self.codes, self.transposed, self.scale, self.down, self.up, self.of_a, self.of_b,
            self.sizes, *self.factors(),
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
            group.down, group.up, group.of_a, group.of_b, codes_of_a, codes_of_b = parts
            group.transposed[:, group.outputs :].copy_(codes_of_a)
            group.codes[:, group.inputs :].copy_(codes_of_b)


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
        `[columns, in]` and `[out, columns]`; what the gradients of As and Bs have to be multiplied with, `[columns]`
        each; and the codes of As `[in, columns]` and Bs `[out, columns]`.
    """
    as_, bs, ranks = factors[0::2], factors[1::2], [rank for _, rank in sizes]
    scales_a, scales_b = ([scale_of([factor], E4M3) for factor in part] for part in (as_, bs))
    down = [(a.float() * (s * of_b / scale)).to(a.dtype) for a, of_b, s in zip(as_, scales_b, scalings)]
    up = [(b.float() * (s * of_a / scale)).to(b.dtype) for b, of_a, s in zip(bs, scales_a, scalings)]
    rows = [cast_with(a, of_a, E4M3).view(torch.uint8) for a, of_a in zip(as_, scales_a)]
    blocks = [cast_with(b, of_b, E4M3).view(torch.uint8) for b, of_b in zip(bs, scales_b)]
    return (
        _below(down, columns),
        _diagonal(up, columns),
        _below([(scale / of_a).expand(-1, rank, 1) for of_a, rank in zip(scales_a, ranks)], columns)[..., 0],
        _below([(scale / of_b).expand(-1, rank, 1) for of_b, rank in zip(scales_b, ranks)], columns)[..., 0],
        _below(rows, columns).mT,
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
        ctx: Any, x: Tensor, codes: Tensor, transposed: Tensor, scale: Tensor, down: Tensor, up: Tensor,
        of_a: Tensor, of_b: Tensor, sizes: Any, *factors: Tensor,
    ) -> Any:  # fmt: skip
        xa = x @ down.mT
        of_x = scale_of([x, xa], E4M3)
        out = scaled_matmul(_beside([x, xa], of_x, E4M3), codes.view(E4M3).mT, of_x, scale, x.dtype)
        ctx.sizes, ctx.dtype = sizes, factors[0].dtype
        ctx.save_for_backward(x, (xa * of_b).to(x.dtype), transposed, scale, up, of_a)
        return out.split([out for out, _ in sizes], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, xa, transposed, scale, up, of_a = ctx.saved_tensors
        (first, *others), parts = gradients, places(ctx.sizes)
        ga = first @ up[parts[0][0]]
        for gradient, (rows, _) in zip(others, parts[1:]):
            ga = torch.addmm(ga, gradient, up[rows])
        of_gradient = scale_of([*gradients, ga], E5M2)
        cast = _beside([*gradients, ga], of_gradient, E5M2)
        of_x = scaled_matmul(cast, transposed.view(E4M3).mT, of_gradient, scale, x.dtype)
        ga = (ga * of_a).to(x.dtype)[:, : parts[-1][1].stop]
        of_as = matmul_into(ga.mT, x, ctx.dtype).split([rank for _, rank in ctx.sizes])
        of_bs = [matmul_into(gradient.mT, xa[:, ranks], ctx.dtype) for gradient, (_, ranks) in zip(gradients, parts)]
        return of_x, *[None] * 8, *(factor for pair in zip(of_as, of_bs) for factor in pair)


def _beside(parts: Sequence[Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of parts `[t, …]` side by side, written by one pass over them."""
    return torch.cat([cast_with(part, scale, dtype).view(torch.uint8) for part in parts], 1).view(dtype)
