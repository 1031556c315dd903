"""Frozen weights held in 4 bits for QLoRA (torchao's NF4 or bitsandbytes'), or in fp8; whole or in shards.

Weights that are held in the codes of their checkpoint are in `as_stored.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from automodel_trainer.distributed._dtensor import StridedShard, local_tensor
from automodel_trainer.models._transformers import is_loaded, mark_loaded
from automodel_trainer.models.quantization import _bitsandbytes, _torchao
from automodel_trainer.models.quantization.fp8_weight import SCHEMES as FP8_SCHEMES
from automodel_trainer.models.quantization.nf4 import BLOCK, SCALE_BLOCK
from automodel_trainer.models.quantization.quantized_tensor import QuantizedTensor, quantize
from automodel_trainer.nn.mixing import mixed

_RANKS = 8  # on up to this many ranks, shards end between blocks, so every layout has the same quantized weights


class QuantizedWeights(nn.Module):
    """A module that quantizes some of its weights when they are assigned. Mixed in by `prepare_quantization`.

    So while a checkpoint streams in, at most one weight is there in full precision.
    """

    scheme: str
    quantized_names: tuple[str, ...]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in self.quantized_names and param is not None and not param.is_meta and not is_quantized(param):
            loaded = is_loaded(param)
            param = quantized(param, self.scheme)
            mark_loaded(param, loaded)
        super().register_parameter(name, param)


def prepare_quantization(model: nn.Module, scheme: str, weights: Mapping[str, tuple[str, ...]]) -> None:
    """Make `model` (on meta or real) hold these frozen weights quantized from now on.

    Args:
        scheme: of `nf4.SCHEMES`.
        weights: name of a module -> names of its parameters.

    Raises:
        ValueError: the library is not installed, or a weight's size is no multiple of a block.
    """
    _bitsandbytes.functional() if scheme == "bnb-nf4" else _torchao.nf4_tensor()
    for name, names in weights.items():
        module = model.get_submodule(name)
        if not getattr(module, "quantizable", True):
            raise ValueError(
                f"lora quantize={scheme!r}: {name} computes as a {type(module).__name__}, which takes no "
                "quantized weight. Leave kernels linear at 'auto'."
            )
        for key in names:
            if (elements := module._parameters[key].shape.numel()) % BLOCK:  # type: ignore[union-attr]
                raise ValueError(
                    f"lora quantize={scheme!r}: the {key} of {name} has {elements} elements, not a multiple of "
                    f"{BLOCK}. Leave it out with exclude."
                )
        hold_quantized(module, scheme, names)
    ignore_in_ddp(model)


def quantize_linear(model: nn.Module, names: Iterable[str], scheme: str) -> None:
    """Make these frozen linear layers of `model` (on meta or real) hold their weights quantized from now on.

    Args:
        scheme: of `fp8_weight.SCHEMES`.
    """
    quantize_parameters(model, dict.fromkeys(names, ("weight",)), scheme)


def quantize_parameters(model: nn.Module, weights: Mapping[str, tuple[str, ...]], scheme: str) -> None:
    """Make `model` (on meta or real) hold these frozen weights in fp8 from now on.

    Args:
        weights: name of a module -> names of its parameters `[…, out, in]`.
        scheme: of `fp8_weight.SCHEMES`.
    """
    for name, names in weights.items():
        hold_quantized(model.get_submodule(name), scheme, names)
    ignore_in_ddp(model)


def hold_quantized(
    module: nn.Module, scheme: str, names: tuple[str, ...], mixin: type[QuantizedWeights] = QuantizedWeights
) -> None:
    """Make a module hold these parameters quantized from now on."""
    module.__class__ = mixed(mixin, type(module))  # type: ignore[arg-type]
    assert isinstance(module, QuantizedWeights)
    module.scheme, module.quantized_names = scheme, names


def ignore_in_ddp(model: nn.Module) -> None:
    """DDP's first broadcast cannot handle quantized weights. It is not needed: all ranks read the same file."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    model._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]


def is_to_be_quantized(module: nn.Module, name: str) -> bool:
    """Whether this parameter of `module` is quantized, or will be once it is real."""
    return isinstance(module, QuantizedWeights) and name in module.quantized_names


def quantized_weights(model: nn.Module) -> set[nn.Parameter]:
    """The weights that are quantized, or will be once they are real."""
    return {
        module._parameters[name]  # type: ignore[misc]
        for module in model.modules()
        if isinstance(module, QuantizedWeights)
        for name in module.quantized_names
    }


@torch.no_grad()
def quantize_weights(model: nn.Module) -> None:
    """Quantize the weights that were assigned before `prepare_quantization` was called. Collective."""
    for module in model.modules():
        for name in module.quantized_names if isinstance(module, QuantizedWeights) else ():
            weight = module._parameters[name]
            assert weight is not None
            if not is_quantized(weight):
                setattr(module, name, nn.Parameter(weight.detach(), requires_grad=False))


def is_quantized(tensor: Tensor) -> bool:
    """Whether the tensor, or the shard that this rank holds of it, is quantized."""
    return isinstance(local_tensor(tensor), QuantizedTensor)


@torch.no_grad()
def quantized(weight: Tensor, scheme: str) -> nn.Parameter:
    """`weight` quantized, as a frozen parameter of the same shape.

    A DTensor is gathered, quantized and sharded again (collective).

    Raises:
        ValueError: a DTensor is not sharded along dimension 0 into equal shards that end between blocks.
    """
    weight = weight.detach()
    if not isinstance(weight, DTensor):
        return laid_out_as(weight, scheme, lambda index, count: _shard_of(weight, scheme, index, count))
    mesh, device = weight.device_mesh, weight.to_local().device

    def shard(index: int, count: int) -> QuantizedTensor:
        full = weight.to(mesh.device_type).full_tensor()  # type: ignore[attr-defined]
        return _shard_of(full, scheme, index, count).to(device)  # type: ignore[return-value]

    return laid_out_as(weight, scheme, shard)


def laid_out_as(weight: Tensor, scheme: str, shard: Callable[[int, int], QuantizedTensor]) -> nn.Parameter:
    """A frozen parameter that is laid out as `weight` is, and holds something else.

    Args:
        weight: on meta or real, a DTensor or not.
        scheme: for the error message.
        shard: `shard(index, count)` makes one of `count` equal shards along dimension 0.

    Raises:
        ValueError: a DTensor is not sharded along dimension 0 into equal shards.
    """
    if not isinstance(weight, DTensor):
        return nn.Parameter(shard(0, 1), requires_grad=False)
    mesh, shape = weight.device_mesh, weight.shape
    shards = math.prod(mesh.size(axis) for axis, p in enumerate(weight.placements) if _cuts(p))
    if any(not isinstance(p, Replicate) and not _cuts(p) for p in weight.placements) or shape[0] % shards:
        raise ValueError(
            f"A weight of shape {list(shape)} cannot be quantized as {scheme} in {shards} shards: use fewer ranks."
        )
    local = shard(_place(weight), shards)
    spread = DTensor.from_local(local, mesh, weight.placements, run_check=False, shape=shape, stride=weight.stride())
    return nn.Parameter(spread, requires_grad=False)


def _shard_of(weight: Tensor, scheme: str, index: int, count: int) -> QuantizedTensor:
    """One of `count` shards of the quantized weight. It keeps the mean of all scales of the whole weight."""
    scale_block = 0 if scheme in FP8_SCHEMES else _scale_block(weight.shape, count)
    made = quantize(weight, scheme, scale_block)
    return made.shard(index, count) if count > 1 else made


def _place(weight: DTensor) -> int:
    """The index of this rank's shard. Strided axes cut what the others have cut before (experts: ep, then FSDP2)."""
    place = 0
    cutting = [(axis, p) for axis, p in enumerate(weight.placements) if _cuts(p)]
    for axis, _ in sorted(cutting, key=lambda pair: isinstance(pair[1], StridedShard)):
        place = place * weight.device_mesh.size(axis) + weight.device_mesh.get_local_rank(axis)
    return place


def _cuts(placement: Placement) -> bool:
    """Whether a mesh axis cuts dimension 0."""
    return isinstance(placement, Shard | StridedShard) and placement.dim == 0


def _scale_block(shape: torch.Size, shards: int = 1) -> int:
    """How many scales share a second scale: the most for which 1, 2, 4 and 8 shards all end between such groups."""
    elements = shape.numel() // math.lcm(shards, math.gcd(shape[0], _RANKS))
    if elements % BLOCK:
        elements = shape.numel() // shards
    if elements % BLOCK:
        raise ValueError(
            f"A weight of shape {list(shape)} in {shards} shards has {elements} elements per rank, not a multiple of "
            f"the {BLOCK} that share a scale in nf4: use fewer ranks, or leave the layer out with exclude."
        )
    return math.gcd(SCALE_BLOCK, elements // BLOCK)
