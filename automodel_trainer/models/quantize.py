"""4-bit base weights for QLoRA: torchao's NF4, on one device or in FSDP2's shards."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from automodel_trainer.models.lora.layers import LoRALinear, mixed

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a second scale, where a weight is large enough
_RANKS = 8  # up to this many ranks a weight's shards end between blocks, so any layout gets the same numbers


class NF4Linear(nn.Module):
    """A linear layer that packs its weight when it gets it. Mixed in by `prepare_nf4`.

    While a checkpoint streams in, no more than one weight is there in full.
    """

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and param is not None and not param.is_meta and not is_nf4(param):
            loaded = getattr(param, "_is_hf_initialized", False)
            param = packed(param)
            param._is_hf_initialized = loaded  # type: ignore[attr-defined]
        super().register_parameter(name, param)


def prepare_nf4(model: nn.Module) -> None:
    """Make the adapted linear layers of `model` (on meta or real) hold their weights as NF4 from now on.

    Raises:
        ValueError: torchao is not installed, or a weight's size is no multiple of a block.
    """
    _nf4_tensor()
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            if module.weight.shape.numel() % BLOCK:
                raise ValueError(
                    f"lora quantize='nf4': the weight of {name} has {module.weight.shape.numel()} elements, not a "
                    f"multiple of {BLOCK}. Leave it out with exclude."
                )
            module.__class__ = mixed(NF4Linear, type(module))
    # DDP's first broadcast cannot take packed weights, and all ranks read the same file.
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    model._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]


def packed_weights(model: nn.Module) -> set[nn.Parameter]:
    """The weights that are packed, or will be once they are real."""
    return {module.weight for module in model.modules() if isinstance(module, NF4Linear)}  # type: ignore[misc]


@torch.no_grad()
def quantize_nf4(model: nn.Module) -> None:
    """Pack the weights that came before `prepare_nf4` could see them. Collective."""
    for module in model.modules():
        if not isinstance(module, NF4Linear):
            continue
        weight = module._parameters["weight"]
        assert weight is not None
        if not is_nf4(weight):
            module.weight = nn.Parameter(weight.detach(), requires_grad=False)


def is_nf4(tensor: Tensor) -> bool:
    """Whether the tensor, or the shard that this rank holds of it, is packed."""
    return hasattr(tensor._local_tensor if isinstance(tensor, DTensor) else tensor, "quantized_data")


@torch.no_grad()
def packed(weight: Tensor) -> nn.Parameter:
    """`weight` as NF4, frozen. A DTensor is gathered, packed and sharded again (collective)."""
    weight = weight.detach()
    if not isinstance(weight, DTensor):
        return nn.Parameter(_nf4_tensor().from_tensor(weight, BLOCK, _scale_block(weight.shape)), requires_grad=False)
    mesh, shape = weight.device_mesh, weight.shape
    shards = math.prod(mesh.size(axis) for axis, p in enumerate(weight.placements) if isinstance(p, Shard))
    if any(not isinstance(p, Replicate) and p != Shard(0) for p in weight.placements) or shape[0] % shards:
        raise ValueError(
            f"A weight of shape {list(shape)} cannot be packed as nf4 in {shards} shards: use fewer ranks."
        )
    full = weight.to(mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    whole = _nf4_tensor().from_tensor(full, BLOCK, _scale_block(shape, shards))
    # torchao splits packed rows, scales and second scales alike; the mean of all scales stays the whole weight's.
    local = whole.split(shape[0] // shards)[_place(weight)] if shards > 1 else whole
    local = local.to(weight.to_local().device)
    spread = DTensor.from_local(local, mesh, weight.placements, run_check=False, shape=shape, stride=weight.stride())
    return nn.Parameter(spread, requires_grad=False)


def _place(weight: DTensor) -> int:
    """This rank's place among the shards."""
    place = 0
    for axis, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            place = place * weight.device_mesh.size(axis) + weight.device_mesh.get_local_rank(axis)
    return place


def _scale_block(shape: torch.Size, shards: int = 1) -> int:
    """The largest second block that ends where a shard does, for 1, 2, 4 and 8 shards alike."""
    elements = shape.numel() // math.lcm(shards, math.gcd(shape[0], _RANKS))
    if elements % BLOCK:
        elements = shape.numel() // shards
    if elements % BLOCK:
        raise ValueError(
            f"A weight of shape {list(shape)} in {shards} shards has {elements} elements per rank, not a multiple of "
            f"the {BLOCK} that share a scale in nf4: use fewer ranks, or leave the layer out with exclude."
        )
    return math.gcd(SCALE_BLOCK, elements // BLOCK)


def _nf4_tensor() -> Any:
    try:
        from torchao.quantization import NF4Tensor
    except ImportError as error:
        raise ValueError("lora quantize='nf4' needs torchao: pip install 'automodel-trainer[fp8]'.") from error
    return NF4Tensor
