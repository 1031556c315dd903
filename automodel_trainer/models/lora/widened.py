"""One matmul for frozen weights that share an input and for their adapters.

    W·x + s·B·A·x  =  [W, B] · [x, s·A·x]        forward
    Wᵀ·g + s·Aᵀ·Bᵀ·g  =  [Wᵀ, s·Aᵀ] · [g, Bᵀ·g]   backward, the gradient of x

The weights are stored one below the other, with a few more columns, which hold the Bs, and a few more rows, which hold
the As. So an update costs no pass over the layer's output, and its backward none over the gradient of the input. The
weights must lie whole on the device, in the dtype that they compute in; shards, packed and fp8 weights compute base and
update apart. So does what is not compiled: there each pass costs a kernel of its own anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from automodel_trainer.models.lora.layers import LoRALinear

ALIGNMENT = 16  # bytes that a row's length must be a multiple of for the fastest matmuls


class WidenedGroup:
    """Linear layers that get the same input, in the order in which they run, as one matrix.

        W₁ B₁ 0
        W₂ 0  B₂
        A₁ 0  0         (times their scaling)
        A₂ 0  0

    A and B change with every optimizer step, and under FSDP2 they are other tensors in every forward: they are copied
    in before every use (`refresh`).
    """

    def __init__(self, layers: Sequence[LoRALinear]) -> None:
        self.layers = list(layers)
        self.inputs = self.layers[0].in_features
        self.sizes = tuple((layer.out_features, layer.lora_B.in_features) for layer in self.layers)
        weight = self.layers[0].weight
        self.outputs, rank = (sum(part) for part in zip(*self.sizes))
        self.columns = rank + -rank % (ALIGNMENT // weight.element_size())
        shape = (self.outputs + self.columns, self.inputs + self.columns)
        self.storage = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        # Set by who refreshes before he calls compiled code: the copies must not be part of that.
        self.kept_fresh = False
        self._computed: tuple[Tensor, list[Tensor | None]] | None = None
        self._hold_weights()

    def takes(self, x: Tensor) -> bool:
        """Whether the matmul can be done for this input, here and now."""
        if not torch.compiler.is_compiling() or not self.kept_fresh or torch.is_autocast_enabled(x.device.type):
            return False
        factors = (factor for layer in self.layers for factor in (layer.lora_A.weight, layer.lora_B.weight))
        return x.dtype == self.storage.dtype and all(factor.dtype == x.dtype for factor in factors)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the factors in; and the weights, if they were moved or replaced since."""
        storage = self.storage.data
        parts = [storage[rows, : self.inputs] for rows, _ in _places(self.sizes)]
        if any(part.data_ptr() != layer.weight.data_ptr() for part, layer in zip(parts, self.layers)):
            self.storage = storage = storage.to(self.layers[0].weight.device, self.layers[0].weight.dtype)
            self._hold_weights()
        for (rows, columns), layer in zip(_places(self.sizes), self.layers):
            storage[rows, _after(self.inputs, columns)].copy_(layer.lora_B.weight)
            torch.mul(layer.lora_A.weight, layer.scaling, out=storage[_after(self.outputs, columns), : self.inputs])

    @torch.no_grad()
    def _hold_weights(self) -> None:
        """Take the weights' values in, and make them parts of the storage."""
        for (rows, _), layer in zip(_places(self.sizes), self.layers):
            layer.weight.data = self.storage.data[rows, : self.inputs].copy_(layer.weight.detach())

    def output_of(self, layer: LoRALinear, x: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]`. The first layer of the group that asks computes for all."""
        index = self.layers.index(layer)
        if self._computed is None or self._computed[0] is not x or self._computed[1][index] is None:
            self._computed = (x, list(self.outputs_of(x)))
        outputs = self._computed[1]
        out, outputs[index] = outputs[index], None
        if all(output is None for output in outputs):
            self._computed = None
        assert out is not None
        return out if layer.bias is None else out + layer.bias

    def outputs_of(self, x: Tensor) -> Sequence[Tensor]:
        """x `[..., in]` -> `[..., out]` of every layer, without their biases."""
        factors = [factor for layer in self.layers for factor in (layer.lora_A.weight, layer.lora_B.weight)]
        scalings = tuple(layer.scaling for layer in self.layers)
        xa = None
        if any(layer.lora_dropout and layer.training for layer in self.layers):
            xa = self._after_dropout(x).flatten(0, -2)
        outputs = _Matmul.apply(x.flatten(0, -2), xa, self.storage, self.sizes, scalings, *factors)
        return [out.unflatten(0, x.shape[:-1]) for out in outputs]

    def _after_dropout(self, x: Tensor) -> Tensor:
        """s·A·x `[..., columns]`, every layer with a dropout of its own."""
        parts = [
            F.linear(F.dropout(x, layer.lora_dropout, layer.training), layer.lora_A.weight) * layer.scaling
            for layer in self.layers
        ]
        return F.pad(torch.cat(parts, -1), (0, self.columns - sum(rank for _, rank in self.sizes)))


class _Matmul(torch.autograd.Function):
    """x `[t, in]` -> `[t, out]` of each layer; the storage has no gradient, the factors' are computed here.

    xa: s·A·x `[t, columns]` if it was not computed from x as it is; then A's gradients are its affair.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, xa: Tensor | None, storage: Tensor, sizes: Any, scalings: Any, *factors: Tensor
    ) -> Any:
        outputs, inputs = sum(out for out, _ in sizes), x.shape[1]
        ctx.given, ctx.sizes, ctx.scalings = xa is not None, sizes, scalings
        if xa is None:
            both = torch.cat((x, x.new_empty(x.shape[0], storage.shape[1] - inputs)), 1)
            multiply_beside(both, storage[outputs:, :inputs], inputs)
            xa = both[:, inputs:]
        else:
            both = torch.cat((x, xa), 1)
        ctx.save_for_backward(x, xa.contiguous(), storage)
        return (both @ storage[:outputs].mT).split([out for out, _ in sizes], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, xa, storage = ctx.saved_tensors
        inputs, outputs, sizes = x.shape[1], sum(out for out, _ in ctx.sizes), ctx.sizes
        both = torch.cat((*gradients, x.new_empty(x.shape[0], xa.shape[1])), 1)
        multiply_beside(both, storage[:outputs, inputs:].mT, outputs)
        of_b = [both[:, rows].mT @ xa[:, columns] for rows, columns in _places(sizes)]
        of_xa = both[:, outputs:]
        if ctx.given:
            of_factors = [factor for b in of_b for factor in (None, b)]
            return both[:, :outputs] @ storage[:outputs, :inputs], of_xa.contiguous(), None, None, None, *of_factors
        of_a = of_xa.mT @ x
        parts = [of_a[columns] * scaling for (_, columns), scaling in zip(_places(sizes), ctx.scalings)]
        return both @ storage[:, :inputs], None, None, None, None, *(f for pair in zip(parts, of_b) for f in pair)


@torch.library.custom_op("automodel_trainer::multiply_beside", mutates_args=("both",))
def multiply_beside(both: Tensor, factor: Tensor, width: int) -> None:
    """both[:, width:] = both[:, :width] · factorᵀ, in place.

    An operation of its own, for the compiler would write what it multiplies twice: once for the product, and once more
    beside it.
    """
    torch.mm(both[:, :width], factor.mT, out=both[:, width:])


def _places(sizes: Sequence[tuple[int, int]]) -> list[tuple[slice, slice]]:
    """Of each layer: its outputs and its ranks, each counted from the first layer's."""
    ends = [list(accumulate(part)) for part in zip(*sizes)]
    return [(slice(o - out, o), slice(r - rank, r)) for o, r, (out, rank) in zip(*ends, sizes)]


def _after(start: int, part: slice) -> slice:
    return slice(start + part.start, start + part.stop)


@torch.no_grad()
def widen_adapters(model: nn.Module, choice: str, groups: Sequence[Sequence[str]] | None = None) -> None:
    """Store the frozen weights of adapted linear layers widened, in place; their names, shapes and values stay.

    Call it when the weights are real, and where they will stay.

    Args:
        choice: of `KernelsConfig.lora`: "widened", "separate", or "auto" (widened on a GPU in compiled blocks).
        groups: names of layers that share an input (`layers_with_one_input`); None: none do.

    Raises:
        ValueError: "widened", and there is no layer that could be.
    """
    layers = {} if choice == "separate" else {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    fit = {name: layer for name, layer in layers.items() if obstacle(layer) is None}
    if choice == "auto":
        compiled = _inside_compiled_blocks(model)
        fit = {name: layer for name, layer in fit.items() if layer.weight.is_cuda and id(layer) in compiled}
    if choice == "widened" and not fit:
        reasons = sorted({str(obstacle(layer)) for layer in layers.values()}) or ["there is none"]
        raise ValueError(
            f"kernels lora='widened' fits no adapted layer here: {'; '.join(reasons)}. Leave it at 'auto'."
        )
    for names in [[name] for name in fit] if groups is None else groups:
        alike: dict[Any, list[LoRALinear]] = {}
        for layer in (fit[name] for name in names if name in fit):
            alike.setdefault((layer.weight.dtype, layer.weight.device), []).append(layer)
        for members in alike.values():
            group = WidenedGroup(members)
            for layer in members:
                layer.widened = group


def _inside_compiled_blocks(model: nn.Module) -> set[int]:
    blocks = (block for block in model.modules() if getattr(block, "runs_compiled", False))
    return {id(module) for block in blocks for module in block.modules()}


def widened_groups(block: nn.Module) -> list[WidenedGroup]:
    """Those of a block that is compiled, for who refreshes each of them before every run of it."""
    groups = {id(m.widened): m.widened for m in block.modules() if isinstance(m, LoRALinear) and m.widened is not None}
    for group in groups.values():
        group.kept_fresh = True
    return list(groups.values())


def obstacle(module: LoRALinear) -> str | None:
    """Why a layer cannot be widened; None if it can."""
    weight = module.weight
    if isinstance(weight, DTensor):
        return "its weight is sharded"
    if hasattr(weight, "get_original_weight"):
        return "its weight is packed"
    if weight.is_meta:
        return "its weight is on meta"
    if module.lora_magnitude_vector is not None:
        return "DoRA needs base and update apart"
    if weight.requires_grad:
        return "its weight is trained"
    base = next(cls for cls in type(module).__mro__ if not issubclass(cls, LoRALinear) and "forward" in vars(cls))
    return None if base is nn.Linear else f"it computes as a {base.__name__}"
