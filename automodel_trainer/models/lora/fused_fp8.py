"""One fp8 matmul for frozen weights that share an input and for their adapters. The weights share one scale.

The weights are S·codes, B is b·codes, A is a·codes. The matmul has one scale for the weights, S. So b and a are
multiplied into the other operand before it is cast:

    out = S·r·([x, xa]·[W, B] in codes)        xa = scaling·b/S · A·x
    of x = S·r·([g, ga]·[W; A] in codes)       ga = scaling·a/S · Bᵀ·g

r is a scale per token: the norm of its row of x, or of g, times a factor that is computed once per optimizer step. No
element of a row is larger than the row's norm, and no product with a row of A is larger than the product of both norms
(Cauchy-Schwarz). So r is known before xa is, and the kernel that produces x casts the row. r is a power of two:
multiplying with it only changes exponents, before a sum or after it. Because every row has its own scale, gradients do
not need the wider range of E5M2. They use E4M3 too, and its errors are half as large.

The gradients of A and B are computed from values that were not cast. An update is as exact as the weight: three bits of
mantissa.
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

_SMALLEST = 1e-30  # a lower bound of scales: a row of zeros needs one too
_MARGIN = 1.02  # for the rounding of products in 16 bits
# Up to this many elements of a weight, cuBLAS is as fast with a scale per row as with one scale. The product with a
# larger weight is scaled by the code that reads it, which is elementwise for gate and up and their input's gradient.
_SCALED_BY_CUBLAS = 2**26


class FusedFp8(FusedGroup):
    """Weights held in fp8 ("tensorwise"), one below the other, and a second time transposed.

    An fp8 matmul takes both operands along the dimension that is summed. With a single copy, every backward would have
    to transpose the weights. Adapters must have no dropout.
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
        """groups: those of the whole model; this one is appended."""
        super().__init__(layers)
        self.groups = [] if groups is None else groups
        self.groups.append(self)
        self.columns = self.rank + -self.rank % ALIGNMENT
        self._hold_weights()

    def refresh_factors(self) -> None:
        _refresh_factors([self, *self._others_due()])

    def _others_due(self) -> Sequence[FusedFp8]:
        """Groups of other blocks whose factors are whole here. FSDP2 may have to gather those of the rest first."""
        if not weights_are_unchanged() or not self.groups[-1].has_whole_factors():
            return []
        return [g for g in self.groups if g is not self and g.has_whole_factors() and g.cache.is_stale()]

    def has_whole_factors(self) -> bool:
        """Whether no factor of the group is sharded at this moment."""
        return all(map(_is_whole, self.factors()))

    def follow_weights(self) -> None:
        """Take weights in that were moved or replaced."""
        held = [self.codes[rows, : self.inputs].data_ptr() for rows, _ in places(self.sizes)]
        if any(pointer != _quantized(layer).parts.codes.data_ptr() for pointer, layer in zip(held, self.layers)):
            self._hold_weights()

    @torch.no_grad()
    def _hold_weights(self) -> None:
        """Give all weights one scale, copy them into `codes`, and let each be a view of its part."""
        device = self.layers[0].weight.device
        self.codes = torch.empty(self.outputs, self.inputs + self.columns, dtype=torch.uint8, device=device)
        self.transposed = self.codes.new_empty(self.inputs, self.outputs + self.columns)
        self.ones = torch.ones(1, max(self.outputs, self.inputs), device=device)
        self.scale = torch.stack([_quantized(layer).parts.scales[0] for layer in self.layers]).amax().view(1, 1)
        for (rows, _), layer in zip(places(self.sizes), self.layers):
            weight = _quantized(layer)
            numbers = weight.parts.codes.view(E4M3).float() * weight.parts.scales[0]
            codes = self.codes[rows, : self.inputs].copy_(cast_with(numbers, self.scale, E4M3).view(torch.uint8))
            parts = replace(weight.parts, codes=codes, scales=self.scale[0].expand(len(codes)).clone())
            held = QuantizedTensor(parts, weight.scheme, weight.shape, weight.dtype)
            layer.weight = nn.Parameter(held, requires_grad=False)
        self.transposed[:, : self.outputs] = self.codes[:, : self.inputs].mT

    def outputs_of(self, x: Tensor) -> Sequence[Tensor]:
        outputs = _Matmul.apply(
            x.flatten(0, -2), self.codes, self.transposed, self.scale, self.down, self.up, self.of_a, self.of_b,
            self.of_x, self.of_gradient, self.ones, self.sizes, *self.factors(),
        )  # fmt: skip
        return [out.unflatten(0, x.shape[:-1]) for out in outputs]


def _quantized(layer: LoRALinear) -> QuantizedTensor:
    weight: Any = layer.weight
    assert isinstance(weight, QuantizedTensor)
    return weight


@torch.no_grad()
def _refresh_factors(groups: Sequence[FusedFp8]) -> None:
    """`refresh_factors` for all groups at once. One call per group would let the device wait for the host."""
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
    """Whether this rank holds all of it."""
    if not isinstance(factor, DTensor):
        return True
    return all(size == 1 or p.is_replicate() for size, p in zip(factor.device_mesh.shape, factor.placements))


def _local(factor: Tensor) -> Tensor:
    return factor.to_local() if isinstance(factor, DTensor) else factor


def _border(scale: Tensor, sizes: Any, scalings: Any, columns: int, *factors: Tensor) -> tuple[Tensor, ...]:
    """All tensors of groups of one shape that change with their factors.

    Args:
        scale: S of each group, `[groups, 1, 1]`.
        factors: A `[groups, rank, in]` and B `[groups, out, rank]` of every layer.

    Returns:
        for each group, in this order: `down` `[columns, in]` and `up` `[out, columns]`, which x and the gradient are
        multiplied with; `of_a` and `of_b` `[columns]`, which the gradients of A and B are multiplied with; `of_x` and
        `of_gradient`, 0-dim, which turn the norm of a row of x or of the gradient into its scale; and the codes of A
        `[in, columns]` and B `[out, columns]`.
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
    """The factor from a row's norm to a scale at which its elements, and its products with factors, fit into fp8.

    Args:
        factors: `[groups, …]`, three dimensions.
        dim: the dimension that is summed in the product.

    Returns:
        `[groups]`.
    """
    longest = torch.linalg.vector_norm(factors.float(), dim=dim).amax(1)
    return longest.clamp(min=1) * _MARGIN / torch.finfo(E4M3).max


def _below(parts: Sequence[Tensor], rows: int) -> Tensor:
    """Parts `[groups, …, n]` one below the other, padded to `[groups, rows, n]`."""
    return F.pad(torch.cat(list(parts), 1), (0, 0, 0, rows - sum(part.shape[1] for part in parts)))


def _diagonal(parts: Sequence[Tensor], columns: int) -> Tensor:
    """A block diagonal of parts `[groups, …, …]`, padded to `[groups, n, columns]`."""
    ends = list(accumulate(part.shape[2] for part in parts))
    return torch.cat([F.pad(part, (end - part.shape[2], columns - end)) for part, end in zip(parts, ends)], 1)


@cache
def _compiled_border() -> Any:
    """`_border` as a few kernels. Uncompiled it takes about thirty for every layer."""
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
        # The compiler's partitioner knows slices as views. For `split` it would save, and so write, the scaled product.
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
    """Scales of the rows of parts `[t, …]` that lie side by side: powers of two, fp32 `[t, 1]`."""
    squares = reduce(torch.add, [part.float().square().sum(-1, keepdim=True) for part in parts])
    return (squares.sqrt() * per_length).clamp(min=_SMALLEST).log2().ceil().exp2()


def _multiply(cast: Tensor, codes: Tensor, rows: Tensor, scale: Tensor, ones: Tensor, dtype: torch.dtype) -> Tensor:
    """cast `[t, n]`, with scales `rows` `[t, 1]`, times codes `[m, n]`, with one scale `[1, 1]`: `[t, m]`."""
    second = codes.view(E4M3).mT
    if codes.numel() <= _SCALED_BY_CUBLAS:
        return scaled_matmul(cast, second, rows * scale, ones[:, : codes.shape[0]], dtype)
    return scaled_matmul(cast, second, ones[:, :1], scale, dtype) * rows.to(dtype)


def _beside(parts: Sequence[Tensor], scales: Tensor) -> Tensor:
    """Codes of parts `[t, …]` side by side. One pass over the parts writes them."""
    return side_by_side([cast_with(part, scales, E4M3) for part in parts])
