"""Which adapted layers compute in one matmul with their frozen weights, and which of them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from automodel_trainer.models.lora.fused import FusedDense, FusedGroup
from automodel_trainer.models.lora.fused_fp8 import FusedFp8
from automodel_trainer.models.lora.layers import LoRALinear
from automodel_trainer.models.quantization.quantized_tensor import QuantizedTensor
from automodel_trainer.nn.shared_input import blocks_of


@torch.no_grad()
def fuse_adapters(model: nn.Module, choice: str, groups: Sequence[Sequence[str]] | None = None) -> None:
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
        fit = {n: m for n, m in fit.items() if m.weight.is_cuda and id(m) in compiled}
    if choice == "widened" and not fit:
        reasons = sorted({str(obstacle(layer)) for layer in layers.values()}) or ["there is none"]
        raise ValueError(
            f"kernels lora='widened' fits no adapted layer here: {'; '.join(reasons)}. Leave it at 'auto'."
        )
    blocks = blocks_of(model)
    packed_groups: list[FusedFp8] = []
    for names in [[name] for name in fit] if groups is None else groups:
        alike: dict[Any, list[LoRALinear]] = {}
        for layer in (fit[name] for name in names if name in fit):
            weight = layer.weight
            alike.setdefault((blocks.get(id(layer)), type(weight), weight.dtype, weight.device), []).append(layer)
        for members in alike.values():
            packed = isinstance(members[0].weight, QuantizedTensor)
            group = FusedFp8(members, packed_groups) if packed else FusedDense(members)
            for layer in members:
                layer.widened = group


def _inside_compiled_blocks(model: nn.Module) -> set[int]:
    blocks = (block for block in model.modules() if getattr(block, "runs_compiled", False))
    return {id(module) for block in blocks for module in block.modules()}


def fused_groups(block: nn.Module) -> list[FusedGroup]:
    """Those of a block that is compiled, for who refreshes each of them before every run of it."""
    held = (module.widened for module in block.modules() if isinstance(module, LoRALinear))
    groups = list(dict.fromkeys(group for group in held if isinstance(group, FusedGroup)))
    for group in groups:
        group.kept_fresh = True
    return groups


def obstacle(module: LoRALinear) -> str | None:
    """Why a layer cannot be widened; None if it can."""
    weight = module.weight
    if isinstance(weight, DTensor):
        return "its weight is sharded"
    if hasattr(weight, "get_original_weight"):
        if getattr(weight, "packing", None) != "fp8-tensorwise":
            return "its weight is packed"
        if module.lora_dropout:
            return "in fp8, dropout needs base and update apart"
    if weight.is_meta:
        return "its weight is on meta"
    if module.lora_magnitude_vector is not None:
        return "DoRA needs base and update apart"
    if weight.requires_grad:
        return "its weight is trained"
    base = next(cls for cls in type(module).__mro__ if not issubclass(cls, LoRALinear) and "forward" in vars(cls))
    return None if base is nn.Linear else f"it computes as a {base.__name__}"
