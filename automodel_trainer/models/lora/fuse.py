"""Choose which adapted layers compute in one matmul with their frozen weights, and in which groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from automodel_trainer.models.lora.fused import FusedDense, FusedGroup
from automodel_trainer.models.lora.fused_fp8 import FusedFp8
from automodel_trainer.models.lora.layers import LoRALayer, LoRALinear
from automodel_trainer.models.quantization.quantized_tensor import QuantizedTensor
from automodel_trainer.models.record import CompiledBlock, recorded
from automodel_trainer.nn.shared_input import blocks_of


@dataclass(frozen=True)
class Fusion:
    """What `fuse_adapters` is to do once the weights are real. An entry of the model's record.

    Args:
        choice: of `KernelsConfig.lora`.
        groups: names of layers that share an input; None: each layer is a group of its own.
    """

    choice: str
    groups: list[list[str]] | None


def fuse_as_chosen(model: nn.Module) -> None:
    """Let adapters compute as the model's record says. Without an entry they stay as they are."""
    if (fusion := recorded(model, Fusion)) is not None:
        fuse_adapters(model, fusion.choice, fusion.groups)


@torch.no_grad()
def fuse_adapters(model: nn.Module, choice: str, groups: Sequence[Sequence[str]] | None = None) -> None:
    """Fuse adapted linear layers with their frozen weights, in place. Names, shapes and values of parameters stay.

    Call it when the weights are real and on their final device.

    Args:
        choice: of `KernelsConfig.lora`: "fused", "separate", or "auto" (fused on a GPU in compiled blocks).
        groups: names of layers that share an input (`layers_with_one_input`); None: each layer is a group of its own.

    Raises:
        ValueError: "fused", and no layer can be fused.
    """
    layers = {} if choice == "separate" else {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    fit = {name: layer for name, layer in layers.items() if obstacle(layer) is None}
    if choice == "auto":
        compiled = _inside_compiled_blocks(model)
        fit = {n: m for n, m in fit.items() if m.weight.is_cuda and id(m) in compiled}
    if choice == "fused" and not fit:
        reasons = sorted({str(obstacle(layer)) for layer in layers.values()}) or ["there is none"]
        raise ValueError(f"kernels lora='fused' fits no adapted layer here: {'; '.join(reasons)}. Leave it at 'auto'.")
    blocks = blocks_of(model)
    fp8_groups: list[FusedFp8] = []
    for names in [[name] for name in fit] if groups is None else groups:
        alike: dict[Any, list[LoRALinear]] = {}
        for layer in (fit[name] for name in names if name in fit):
            weight = layer.weight
            alike.setdefault((blocks.get(id(layer)), type(weight), weight.dtype, weight.device), []).append(layer)
        for members in alike.values():
            in_fp8 = isinstance(members[0].weight, QuantizedTensor)
            group = FusedFp8(members, fp8_groups) if in_fp8 else FusedDense(members)
            for layer in members:
                layer.fused = group


def _inside_compiled_blocks(model: nn.Module) -> set[int]:
    blocks = (block for block in model.modules() if recorded(block, CompiledBlock))
    return {id(module) for block in blocks for module in block.modules()}


def fused_groups(block: nn.Module) -> list[FusedGroup]:
    """The groups of a compiled block. The caller must `refresh` them before every run of the block."""
    held = (module.fused for module in block.modules() if isinstance(module, LoRALinear))
    groups = list(dict.fromkeys(group for group in held if isinstance(group, FusedGroup)))
    for group in groups:
        group.kept_fresh = True
    return groups


def obstacle(module: LoRALinear) -> str | None:
    """Why a layer cannot be fused; None if it can."""
    weight = module.weight
    if isinstance(weight, DTensor):
        return "its weight is sharded"
    if isinstance(weight, QuantizedTensor):
        if weight.scheme != "fp8-tensorwise":
            return "its weight is quantized"
        if module.lora_dropout:
            return "in fp8, dropout needs base and update apart"
    if weight.is_meta:
        return "its weight is on meta"
    if module.lora_magnitude_vector is not None:
        return "DoRA needs base and update apart"
    if weight.requires_grad:
        return "its weight is trained"
    base = next(cls for cls in type(module).__mro__ if not issubclass(cls, LoRALayer) and "forward" in vars(cls))
    return None if base is nn.Linear else f"it computes as a {base.__name__}"
