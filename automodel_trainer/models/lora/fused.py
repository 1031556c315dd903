"""One matmul for frozen weights that share an input and for their adapters.

    W·x + s·B·A·x  =  [W, B] · [x, s·A·x]        forward
    Wᵀ·g + s·Aᵀ·Bᵀ·g  =  [Wᵀ, s·Aᵀ] · [g, Bᵀ·g]   backward, the gradient of x

The weights are stored as one matrix, one below the other. A few more columns hold the Bs, and a few more rows hold the
As. So an update costs no pass over the layer's output, and its backward costs no pass over the gradient of the input.
Each weight must lie whole on the device, in the dtype that it computes in (`FusedDense`) or in fp8 (`FusedFp8`). Shards
and 4-bit weights compute base and update separately. So does code that is not compiled, where every pass costs a kernel
of its own anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from automodel_trainer.models.lora.functional import matmul_into
from automodel_trainer.models.lora.layers import LoRALinear
from automodel_trainer.nn.operators import operator
from automodel_trainer.nn.shared_input import SharedInput
from automodel_trainer.nn.step_cache import StepCache

# The length of a row in bytes is a multiple of this. The compiler pads the rows of its large buffers to the same
# multiple; it would copy a buffer of another length for `multiply_beside`, and copy it back.
ALIGNMENT = 128

_SUMMED = 16  # for fewer elements the compiler would write additions instead of a reduction


class FusedGroup(SharedInput[LoRALinear]):
    """Adapted layers that get the same input."""

    def __init__(self, layers: Sequence[LoRALinear]) -> None:
        super().__init__(layers)
        self.inputs = self.layers[0].in_features
        self.sizes = tuple((layer.out_features, layer.lora_B.in_features) for layer in self.layers)
        self.outputs, self.rank = (sum(part) for part in zip(*self.sizes))
        # True if the caller of compiled code calls `refresh` first. The copies must stay outside of compiled code.
        self.kept_fresh = False
        self.cache = StepCache()  # for `refresh`

    def refresh_factors(self) -> None:
        """Copy the current factors into the matrix, and weights that were moved or replaced."""
        raise NotImplementedError

    def takes(self, x: Tensor) -> bool:
        """Whether the group can compute for this input `[..., in]`, here and now."""
        if not torch.compiler.is_compiling() or not self.kept_fresh or torch.is_autocast_enabled(x.device.type):
            return False
        held = {layer.compute_dtype or factor.dtype for layer in self.layers for factor in layer.held_factors()}
        return held == {x.dtype} == {layer.weight.dtype for layer in self.layers}

    def factors(self) -> list[Tensor]:
        """A `[rank, in]` and B `[out, rank]` of every layer, in the dtype that they are held in."""
        return [factor for layer in self.layers for factor in layer.held_factors()]


def refresh(groups: Sequence[FusedGroup]) -> None:
    """Let groups compute with their current factors. Call it before compiled code that runs these groups.

    Factors change with every optimizer step. Inside `unchanged_weights` only the first call does something.
    """
    for group in groups:
        if group.cache.is_stale():
            group.refresh_factors()


class FusedDense(FusedGroup):
    """Weights in the dtype that they compute in, as one matrix `[Σ out + columns, in + columns]`:

    W₁ B₁ 0
    W₂ 0  B₂
    A₁ 0  0         (times their scaling)
    A₂ 0  0
    """

    def __init__(self, layers: Sequence[LoRALinear]) -> None:
        super().__init__(layers)
        weight = self.layers[0].weight
        self.columns = self.rank + -self.rank % (ALIGNMENT // weight.element_size())
        shape = (self.outputs + self.columns, self.inputs + self.columns)
        self.storage = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self._hold_weights()

    @torch.no_grad()
    def refresh_factors(self) -> None:
        storage = self.storage.data
        parts = [storage[rows, : self.inputs] for rows, _ in places(self.sizes)]
        if any(part.data_ptr() != layer.weight.data_ptr() for part, layer in zip(parts, self.layers)):
            self.storage = storage = storage.to(self.layers[0].weight.device, self.layers[0].weight.dtype)
            self._hold_weights()
        for (rows, columns), layer in zip(places(self.sizes), self.layers):
            storage[rows, after(self.inputs, columns)].copy_(layer.lora_B.weight)
            torch.mul(layer.lora_A.weight, layer.scaling, out=storage[after(self.outputs, columns), : self.inputs])

    @torch.no_grad()
    def _hold_weights(self) -> None:
        """Copy the weights into the storage, and let each be a view of its part."""
        for (rows, _), layer in zip(places(self.sizes), self.layers):
            layer.weight.data = self.storage.data[rows, : self.inputs].copy_(layer.weight.detach())

    def outputs_of(self, x: Tensor) -> Sequence[Tensor]:
        scalings = tuple(layer.scaling for layer in self.layers)
        drops = any(layer.drops for layer in self.layers)
        xa = self._after_dropout(x).flatten(0, -2) if drops else None
        outputs = _Matmul.apply(x.flatten(0, -2), xa, self.storage, self.sizes, scalings, *self.factors())
        return [out.unflatten(0, x.shape[:-1]) for out in outputs]

    def _after_dropout(self, x: Tensor) -> Tensor:
        """s·A·x `[..., columns]` of x `[..., in]`; every layer has a dropout of its own."""
        parts = [F.linear(layer.after_dropout(x), layer.factors()[0]) * layer.scaling for layer in self.layers]
        return F.pad(torch.cat(parts, -1), (0, self.columns - self.rank))


class _Matmul(torch.autograd.Function):
    """x `[t, in]` -> `[t, out]` of each layer. The storage has no gradient; those of the factors are computed here.

    xa: s·A·x `[t, columns]` where x went through dropout first. Its own autograd graph then has the gradients of A.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, xa: Tensor | None, storage: Tensor, sizes: Any, scalings: Any, *factors: Tensor
    ) -> Any:
        outputs, inputs = sum(out for out, _ in sizes), x.shape[1]
        ctx.given, ctx.sizes, ctx.scalings, ctx.dtype = xa is not None, sizes, scalings, factors[0].dtype
        if xa is None:
            both = with_room([x], storage.shape[1] - inputs)
            xa = multiply_beside(both, storage[outputs:, :inputs], inputs)
        else:
            both = torch.cat((x, xa), 1)
        ctx.save_for_backward(x, xa, storage)
        return (both @ storage[:outputs].mT).split([out for out, _ in sizes], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, xa, storage = ctx.saved_tensors
        inputs, outputs, sizes = x.shape[1], sum(out for out, _ in ctx.sizes), ctx.sizes
        both = with_room(gradients, xa.shape[1])
        of_xa = multiply_beside(both, storage[:outputs, inputs:].mT, outputs)
        of_b = [matmul_into(both[:, rows].mT, xa[:, columns], ctx.dtype) for rows, columns in places(sizes)]
        if ctx.given:
            of_factors = [factor for b in of_b for factor in (None, b)]
            return both[:, :outputs] @ storage[:outputs, :inputs], of_xa, None, None, None, *of_factors
        of_a = matmul_into(of_xa.mT, x, ctx.dtype)
        parts = [of_a[columns] * scaling for (_, columns), scaling in zip(places(sizes), ctx.scalings)]
        return both @ storage[:, :inputs], None, None, None, None, *(f for pair in zip(parts, of_b) for f in pair)


@operator("multiply_beside", mutates_args=("both",))
def multiply_beside(both: Tensor, factor: Tensor, width: int) -> Tensor:
    """both[:, width:] = both[:, :width] · factorᵀ, in place; returns the product.

    This is a custom operation because the compiler would write the left part twice: once as an input of the product,
    and once more beside it.

    Args:
        both: `[t, width + columns]`.
        factor: `[columns, width]`.

    Returns:
        `[t, columns]`.
    """
    product = both[:, :width] @ factor.mT
    both[:, width:] = product
    return product


@multiply_beside.register_fake
def _(both: Tensor, factor: Tensor, width: int) -> Tensor:
    return both.new_empty(both.shape[0], factor.shape[0])


def with_room(parts: Sequence[Tensor], columns: int) -> Tensor:
    """Parts `[t, …]` side by side, followed by `columns` more, which `multiply_beside` fills.

    The added columns are written as a sum of uninitialised values, so that the compiler sees a reduction. It would make
    a `cat` of elementwise results alone into one kernel, in which every column computes all of them, and which is not
    fused with the kernels before it.
    """
    first = parts[0]
    return torch.cat((*parts, first.new_empty(first.shape[0], columns, _SUMMED).sum(-1)), 1)


def places(sizes: Sequence[tuple[int, int]]) -> list[tuple[slice, slice]]:
    """For each layer: the rows of its outputs and the columns of its rank, counted from the first layer's."""
    ends = [list(accumulate(part)) for part in zip(*sizes)]
    return [(slice(o - out, o), slice(r - rank, r)) for o, r, (out, rank) in zip(*ends, sizes)]


def after(start: int, part: slice) -> slice:
    """`part`, moved on by `start`."""
    return slice(start + part.start, start + part.stop)
