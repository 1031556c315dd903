"""One fp8 matmul for frozen weights that share an input and for their adapters (`widened`); weights have one scale.

The weights are S·codes, B is b·codes, A is a·codes. One matmul has one scale for the weights, S, and b and a go into
the other side before that is cast:

    out = S·r·([x, xa]·[W, B] in codes)        xa = scaling·b/S · A·x
    of x = S·r·([g, ga]·[W; A] in codes)       ga = scaling·a/S · Bᵀ·g

r is a scale for every token: the length of its row of x, or of g, times a factor that is made once per optimizer step.
No number of a row is larger than the row is long, and no product with a row of A than both lengths' product
(Cauchy-Schwarz). So r is known while x is made, before xa is, and the pass that makes x casts it. It is a power of two:
to multiply with it changes nothing but exponents, before a sum or after. With a scale for every row gradients need no
format of a wider range, and have E4M3 too, whose errors are half as large as E5M2's.

The gradients of A and B are computed from numbers that were not cast. An update is as exact as the weight is: to three
bits of mantissa.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, reduce
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from automodel_trainer.models.lora.functional import matmul_into
from automodel_trainer.models.lora.fused import ALIGNMENT, FusedGroup, places
from automodel_trainer.models.lora.layers import LoRALinear
from automodel_trainer.models.quantization.fp8_weight import E4M3, cast_with, scale_of, side_by_side
from automodel_trainer.models.quantization.quantized_tensor import QuantizedTensor
from automodel_trainer.nn._torch import scaled_matmul
from automodel_trainer.nn.step_cache import weights_are_unchanged

_SMALLEST = 1e-30  # of what a scale is made from: a row of zeros has one too
_MARGIN = 1.02  # for the rounding of products in 16 bits
# Numbers of a weight up to which cuBLAS multiplies as fast with a scale for every row as with one for all. What a
# larger one makes is scaled by what reads it: for gate and up, and for their input's gradient, that is elementwise.
_SCALED_BY_CUBLAS = 2**26


class FusedFp8(FusedGroup):
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
    of_x: Tensor
    of_gradient: Tensor
    ones: Tensor  # `[1, out or in]`, the larger

    def __init__(self, layers: Sequence[LoRALinear], groups: list[FusedFp8] | None = None) -> None:
        """groups: the model's, to which this one is added."""
        super().__init__(layers)
        self.groups = [] if groups is None else groups
        self.groups.append(self)
        self.columns = self.rank + -self.rank % ALIGNMENT
        self._hold_weights()

    def refresh_factors(self) -> None:
        _take_in([self, *self._others_due()])

    def _others_due(self) -> Sequence[FusedFp8]:
        """Groups of other blocks, where their factors can be seen from here: FSDP2 may have to gather them first."""
        if not weights_are_unchanged() or not self.groups[-1].has_whole_factors():
            return []
        return [g for g in self.groups if g is not self and g.has_whole_factors() and g.cache.is_stale()]

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
        self.ones = torch.ones(1, max(self.outputs, self.inputs), device=device)
        self.scale = torch.stack([_packed(layer).parts.scales[0] for layer in self.layers]).amax().view(1, 1)
        for (rows, _), layer in zip(places(self.sizes), self.layers):
            weight = _packed(layer)
            numbers = weight.parts.codes.view(E4M3).float() * weight.parts.scales[0]
            codes = self.codes[rows, : self.inputs].copy_(cast_with(numbers, self.scale, E4M3).view(torch.uint8))
            parts = replace(weight.parts, codes=codes, scales=self.scale[0].expand(len(codes)).clone())
            held = QuantizedTensor(parts, weight.packing, weight.shape, weight.dtype)
            layer.weight = nn.Parameter(held, requires_grad=False)
        self.transposed[:, : self.outputs] = self.codes[:, : self.inputs].mT

    def outputs_of(self, x: Tensor) -> Sequence[Tensor]:
        outputs = _Matmul.apply(
            x.flatten(0, -2), self.codes, self.transposed, self.scale, self.down, self.up, self.of_a, self.of_b,
            self.of_x, self.of_gradient, self.ones, self.sizes, *self.factors(),
        )  # fmt: skip
        return [out.unflatten(0, x.shape[:-1]) for out in outputs]


def _packed(layer: LoRALinear) -> QuantizedTensor:
    weight: Any = layer.weight
    assert isinstance(weight, QuantizedTensor)
    return weight


@torch.no_grad()
def _take_in(groups: Sequence[FusedFp8]) -> None:
    """`refresh_factors` for all groups at once. One call per group would leave the device waiting for the host."""
    alike: dict[Any, list[FusedFp8]] = {}
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
            group.down, group.up, group.of_a, group.of_b, group.of_x, group.of_gradient, *codes = parts
            group.transposed[:, group.outputs :].copy_(codes[0])
            group.codes[:, group.inputs :].copy_(codes[1])


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
        each; what the lengths of rows of x and of the gradient are multiplied with for their scales, 0-dim; and the
        codes of As `[in, columns]` and Bs `[out, columns]`.
    """
    as_, bs, ranks = factors[0::2], factors[1::2], [rank for _, rank in sizes]
    scales_a, scales_b = ([scale_of([factor], E4M3) for factor in part] for part in (as_, bs))
    down = [(a.float() * (s * of_b / scale)).to(a.dtype) for a, of_b, s in zip(as_, scales_b, scalings)]
    up = [(b.float() * (s * of_a / scale)).to(b.dtype) for b, of_a, s in zip(bs, scales_a, scalings)]
    rows = [cast_with(a, of_a, E4M3).view(torch.uint8) for a, of_a in zip(as_, scales_a)]
    blocks = [cast_with(b, of_b, E4M3).view(torch.uint8) for b, of_b in zip(bs, scales_b)]
    whole_down, whole_up = _below(down, columns), _diagonal(up, columns)
    return (
        whole_down,
        whole_up,
        _below([(scale / of_a).expand(-1, rank, 1) for of_a, rank in zip(scales_a, ranks)], columns)[..., 0],
        _below([(scale / of_b).expand(-1, rank, 1) for of_b, rank in zip(scales_b, ranks)], columns)[..., 0],
        _per_length(whole_down, 2),
        _per_length(whole_up, 1),
        _below(rows, columns).mT,
        _diagonal(blocks, columns),
    )


def _per_length(factors: Tensor, dim: int) -> Tensor:
    """What of a row's length is the scale at which its numbers, and its products with factors, fit into fp8.

    Args:
        factors: `[groups, …]`; along `dim` lies what is summed.

    Returns:
        `[groups]`.
    """
    longest = torch.linalg.vector_norm(factors.float(), dim=dim).amax(1)
    return longest.clamp(min=1) * _MARGIN / torch.finfo(E4M3).max


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
    """x `[t, in]` -> `[t, out]` of each layer. Names are those of `FusedFp8`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, transposed: Tensor, scale: Tensor, down: Tensor, up: Tensor,
        of_a: Tensor, of_b: Tensor, of_x: Tensor, of_gradient: Tensor, ones: Tensor, sizes: Any, *factors: Tensor,
    ) -> Any:  # fmt: skip
        xa = x @ down.mT
        rows = _scales([x], of_x)
        out = _multiply(_beside([x, xa], rows), codes, rows, scale, ones, x.dtype)
        ctx.sizes, ctx.dtype = sizes, factors[0].dtype
        ctx.save_for_backward(x, (xa * of_b).to(x.dtype), transposed, scale, up, of_a, of_gradient, ones)
        # slices are views to the compiler's partitioner; of `split` it would keep, and so write, what is scaled already
        return tuple(out[:, part] for part, _ in places(sizes))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, xa, transposed, scale, up, of_a, of_gradient, ones = ctx.saved_tensors
        (first, *others), parts = gradients, places(ctx.sizes)
        ga = first @ up[parts[0][0]]
        for gradient, (rows, _) in zip(others, parts[1:]):
            ga = torch.addmm(ga, gradient, up[rows])
        scales = _scales(gradients, of_gradient)
        of_x = _multiply(_beside([*gradients, ga], scales), transposed, scales, scale, ones, x.dtype)
        ga = (ga * of_a).to(x.dtype)[:, : parts[-1][1].stop]
        of_as = matmul_into(ga.mT, x, ctx.dtype).split([rank for _, rank in ctx.sizes])
        of_bs = [matmul_into(gradient.mT, xa[:, ranks], ctx.dtype) for gradient, (_, ranks) in zip(gradients, parts)]
        return of_x, *[None] * 11, *(factor for pair in zip(of_as, of_bs) for factor in pair)


def _scales(parts: Sequence[Tensor], per_length: Tensor) -> Tensor:
    """Of the rows of parts `[t, …]` that lie side by side: powers of two, fp32 `[t, 1]`."""
    squares = reduce(torch.add, [part.float().square().sum(-1, keepdim=True) for part in parts])
    return (squares.sqrt() * per_length).clamp(min=_SMALLEST).log2().ceil().exp2()


def _multiply(cast: Tensor, codes: Tensor, rows: Tensor, scale: Tensor, ones: Tensor, dtype: torch.dtype) -> Tensor:
    """cast `[t, n]`, with a scale for each of its rows, times codes `[m, n]`, with one for all: `[t, m]`."""
    second = codes.view(E4M3).mT
    if codes.numel() <= _SCALED_BY_CUBLAS:
        return scaled_matmul(cast, second, rows * scale, ones[:, : codes.shape[0]], dtype)
    return scaled_matmul(cast, second, ones[:, :1], scale, dtype) * rows.to(dtype)


def _beside(parts: Sequence[Tensor], scales: Tensor) -> Tensor:
    """Codes of parts `[t, …]` side by side, written by one pass over them."""
    return side_by_side([cast_with(part, scales, E4M3) for part in parts])
