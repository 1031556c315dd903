"""One matmul for a frozen weight and its adapter.

    W·x + s·B·A·x  =  [W, B] · [x, s·A·x]

The weight is stored with a few more columns, which hold B. So the update costs no pass over the layer's output, and
neither does its backward: the gradients of x and of s·A·x come out of one matmul too. The whole weight must lie on the
device, in the dtype that it computes in; shards, packed and fp8 weights compute base and update apart.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from automodel_trainer.models.lora.layers import LoRALinear

ALIGNMENT = 16  # bytes that a row's length must be a multiple of for the fastest matmuls


class WidenedWeight:
    """The storage `[out, in + columns]` that holds a frozen weight and, from column `in` on, its adapter's B.

    B changes with every optimizer step, and under FSDP2 it is another tensor in every forward: it is copied in before
    every use (`refresh`).
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        step = ALIGNMENT // weight.element_size()
        self.inputs, self.rank = weight.shape[1], rank
        self.padding = -rank % step
        columns = self.inputs + rank + self.padding
        self.storage = torch.zeros(weight.shape[0], columns, dtype=weight.dtype, device=weight.device)
        # Set by who refreshes before he calls compiled code: the copy must not be part of that.
        self.kept_fresh = False
        self.hold(weight)

    def takes(self, x: Tensor, a: Tensor, b: Tensor) -> bool:
        """Whether the matmul can be done for these inputs and factors, here and now."""
        if torch.is_autocast_enabled(x.device.type) or (torch.compiler.is_compiling() and not self.kept_fresh):
            return False
        return x.dtype == a.dtype == b.dtype == self.storage.dtype

    def refresh(self, weight: Tensor, b: Tensor) -> None:
        """Copy B in; and W, if `weight` was moved or replaced since."""
        storage = self.storage.data  # backward may still want the storage: what it computed with is what it has
        if weight.data_ptr() != storage.data_ptr():
            self.storage = storage = storage.to(weight.device, weight.dtype)
            self.hold(weight)
        storage[:, self.inputs : self.inputs + self.rank].copy_(b.detach())

    def hold(self, weight: Tensor) -> None:
        """Take the weight's values in, and make it a part of the storage."""
        held = self.storage.data[:, : self.inputs]
        weight.data = held.copy_(weight.detach())

    def __call__(self, x: Tensor, xa: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        """x `[..., in]`, xa = s·x·Aᵀ `[..., rank]`, b `[out, rank]`: x·Wᵀ + xa·Bᵀ + bias, `[..., out]`."""
        out = _Matmul.apply(x.flatten(0, -2), xa.flatten(0, -2), b, self.storage, self.padding)
        out = out.unflatten(0, x.shape[:-1])
        return out if bias is None else out + bias


class _Matmul(torch.autograd.Function):
    """x `[t, in]`, xa `[t, rank]`; the storage has no gradient, B's is computed from xa."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, xa: Tensor, b: Tensor, storage: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(xa, storage)
        ctx.inputs, ctx.rank = x.shape[1], xa.shape[1]
        return torch.cat((x, F.pad(xa, (0, padding))), 1) @ storage.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        xa, storage = ctx.saved_tensors
        both = gradient @ storage
        of_xa = both[:, ctx.inputs : ctx.inputs + ctx.rank]
        return both[:, : ctx.inputs], of_xa, gradient.mT @ xa, None, None


@torch.no_grad()
def widen_adapters(model: nn.Module, choice: str) -> None:
    """Store the frozen weights of adapted linear layers widened, in place; their names, shapes and values stay.

    Call it when the weights are real, and where they will stay.

    Args:
        choice: of `KernelsConfig.lora`: "widened", "separate", or "auto" (widened on a GPU).

    Raises:
        ValueError: "widened", and there is no layer that could be.
    """
    layers = [] if choice == "separate" else [m for m in model.modules() if isinstance(m, LoRALinear)]
    fit = [layer for layer in layers if obstacle(layer) is None and (choice == "widened" or layer.weight.is_cuda)]
    if choice == "widened" and not fit:
        reasons = sorted({str(obstacle(layer)) for layer in layers}) or ["there is none"]
        raise ValueError(
            f"kernels lora='widened' fits no adapted layer here: {'; '.join(reasons)}. Leave it at 'auto'."
        )
    for layer in fit:
        layer.widened = WidenedWeight(layer.weight, layer.lora_B.in_features)


def widened_layers(block: nn.Module) -> list[LoRALinear]:
    """The widened layers of a block that is compiled, for who refreshes each of them before every run of it."""
    layers = [m for m in block.modules() if isinstance(m, LoRALinear) and m.widened is not None]
    for layer in layers:
        assert layer.widened is not None
        layer.widened.kept_fresh = True
    return layers


def refresh(layers: list[LoRALinear]) -> None:
    """Copy into each layer's storage what its parameters hold now."""
    for layer in layers:
        assert layer.widened is not None
        layer.widened.refresh(layer.weight, layer.lora_B.weight)


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
