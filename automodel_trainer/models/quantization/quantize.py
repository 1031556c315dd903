"""Frozen weights held packed: in 4 bits for QLoRA (torchao's NF4 or bitsandbytes'), or in fp8; whole or in shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from automodel_trainer.models.quantization import _bitsandbytes, _torchao
from automodel_trainer.models.quantization.fp8_weight import PACKINGS as FP8_PACKINGS
from automodel_trainer.models.quantization.nf4 import BLOCK, SCALE_BLOCK
from automodel_trainer.models.quantization.quantized_tensor import pack
from automodel_trainer.nn.mixing import mixed

_RANKS = 8  # up to this many ranks a weight's shards end between blocks, so any layout gets the same numbers


class PackedWeights(nn.Module):
    """A module that packs some of its weights when it gets them. Mixed in by `prepare_packing`.

    While a checkpoint streams in, no more than one weight is there in full.
    """

    packing: str
    packed_names: tuple[str, ...]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in self.packed_names and param is not None and not param.is_meta and not is_packed(param):
            loaded = getattr(param, "_is_hf_initialized", False)
            param = packed(param, self.packing)
            param._is_hf_initialized = loaded  # type: ignore[attr-defined]
        super().register_parameter(name, param)


def prepare_packing(model: nn.Module, packing: str, weights: Mapping[str, tuple[str, ...]]) -> None:
    """Make `model` (on meta or real) hold these frozen weights packed from now on.

    Args:
        weights: name of a module -> names of its parameters.

    Raises:
        ValueError: the library is not installed, or a weight's size is no multiple of a block.
    """
    _bitsandbytes.functional() if packing == "bnb-nf4" else _torchao.nf4_tensor()
    for name, names in weights.items():
        module = model.get_submodule(name)
        if not getattr(module, "packable", True):
            raise ValueError(
                f"lora quantize={packing!r}: {name} computes as a {type(module).__name__}, which takes no packed "
                "weight. Leave kernels linear at 'auto'."
            )
        for key in names:
            if (elements := module._parameters[key].shape.numel()) % BLOCK:  # type: ignore[union-attr]
                raise ValueError(
                    f"lora quantize={packing!r}: the {key} of {name} has {elements} elements, not a multiple of "
                    f"{BLOCK}. Leave it out with exclude."
                )
        _hold_packed(module, packing, names)
    _ignore_in_ddp(model)


def pack_linear(model: nn.Module, names: Iterable[str], packing: str) -> None:
    """Make these frozen linear layers of `model` (on meta or real) hold their weights packed from now on."""
    for name in names:
        _hold_packed(model.get_submodule(name), packing, ("weight",))
    _ignore_in_ddp(model)


def _hold_packed(module: nn.Module, packing: str, names: tuple[str, ...]) -> None:
    module.__class__ = mixed(PackedWeights, type(module))  # type: ignore[arg-type]
    assert isinstance(module, PackedWeights)
    module.packing, module.packed_names = packing, names


def _ignore_in_ddp(model: nn.Module) -> None:
    """DDP's first broadcast cannot take packed weights, and all ranks read the same file."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    model._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]


def packs(module: nn.Module, name: str) -> bool:
    """Whether this parameter of `module` is packed, or will be once it is real."""
    return isinstance(module, PackedWeights) and name in module.packed_names


def packed_weights(model: nn.Module) -> set[nn.Parameter]:
    """The weights that are packed, or will be once they are real."""
    return {
        module._parameters[name]  # type: ignore[misc]
        for module in model.modules()
        if isinstance(module, PackedWeights)
        for name in module.packed_names
    }


@torch.no_grad()
def pack_weights(model: nn.Module) -> None:
    """Pack the weights that came before `prepare_packing` could see them. Collective."""
    for module in model.modules():
        for name in module.packed_names if isinstance(module, PackedWeights) else ():
            weight = module._parameters[name]
            assert weight is not None
            if not is_packed(weight):
                setattr(module, name, nn.Parameter(weight.detach(), requires_grad=False))


def is_packed(tensor: Tensor) -> bool:
    """Whether the tensor, or the shard that this rank holds of it, is packed."""
    return hasattr(tensor._local_tensor if isinstance(tensor, DTensor) else tensor, "get_original_weight")


@torch.no_grad()
def packed(weight: Tensor, packing: str) -> nn.Parameter:
    """`weight` as NF4, frozen. A DTensor is gathered, packed and sharded again (collective)."""
    weight = weight.detach()
    if not isinstance(weight, DTensor):
        return nn.Parameter(_shard_of(weight, packing, 0, 1), requires_grad=False)
    mesh, shape = weight.device_mesh, weight.shape
    shards = math.prod(mesh.size(axis) for axis, p in enumerate(weight.placements) if isinstance(p, Shard))
    if any(not isinstance(p, Replicate) and p != Shard(0) for p in weight.placements) or shape[0] % shards:
        raise ValueError(
            f"A weight of shape {list(shape)} cannot be packed as {packing} in {shards} shards: use fewer ranks."
        )
    full = weight.to(mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    local = _shard_of(full, packing, _place(weight), shards).to(weight.to_local().device)
    spread = DTensor.from_local(local, mesh, weight.placements, run_check=False, shape=shape, stride=weight.stride())
    return nn.Parameter(spread, requires_grad=False)


def _shard_of(weight: Tensor, packing: str, index: int, count: int) -> Any:
    """One of `count` shards of the packed weight; the mean of all scales stays the whole weight's."""
    scale_block = 0 if packing in FP8_PACKINGS else _scale_block(weight.shape, count)
    if packing == "nf4" and weight.ndim == 2:
        whole = _torchao.nf4_tensor().from_tensor(weight, BLOCK, scale_block)
        return whole.split(weight.shape[0] // count)[index] if count > 1 else whole
    made = pack(weight, packing, scale_block)
    return made.shard(index, count) if count > 1 else made


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
