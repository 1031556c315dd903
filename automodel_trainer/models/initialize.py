"""Random weights that do not depend on the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from automodel_trainer.models._transformers import forget_initialized, initialize_module, tie_weights


@torch.no_grad()
def initialize_weights(model: PreTrainedModel, device: torch.device, seed: int) -> None:
    """Give a model on meta random weights on `device`, by the model's own rules.

    Every module draws with a seed made of `seed` and its name. A sharded module draws its full parameters and keeps its
    shards. So every layout gets the same values, and no rank holds more than one module's full parameters.
    """
    model.to_empty(device=device)
    drawn: set[int] = set()  # a tied weight is drawn once, by the first module that holds it
    for name, module in model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) not in drawn}
        drawn |= {id(p) for p in own.values()}
        if own or dict(module.named_buffers(recurse=False)):
            _draw(model, module, own, device, seed_of(seed, name))
    tie_weights(model)


@torch.no_grad()
def initialize_missing(model: PreTrainedModel, names: Collection[str], device: torch.device, seed: int = 0) -> None:
    """Draw parameters that a checkpoint lacks, as `initialize_weights` draws them: the same under any layout.

    Args:
        model: laid out, with real parameters.
        names: of the parameters to draw. A module is skipped unless all of its own parameters are in it.
        device: of the parameters.
        seed: of the random weights.
    """
    for name in sorted({name.rpartition(".")[0] for name in names}):
        module = model.get_submodule(name)
        own = dict(module.named_parameters(recurse=False))
        if all(f"{name}.{key}" in names for key in own):
            forget_initialized(module)
            _draw(model, module, own, device, seed_of(seed, name))


def _draw(
    model: PreTrainedModel, module: nn.Module, own: dict[str, nn.Parameter], device: torch.device, seed: int
) -> None:
    """Fill a module's `own` parameters. A sharded one is drawn whole, and this rank keeps its shard."""
    sharded = {key: p for key, p in own.items() if isinstance(p, DTensor)}
    for key, parameter in sharded.items():
        module._parameters[key] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        initialize_module(model, module)
    for key, parameter in sharded.items():
        full = module._parameters[key]
        assert full is not None
        shard = distribute_tensor(full.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
        module._parameters[key] = parameter


def seed_of(seed: int, name: str) -> int:
    """The seed for the module or adapter `name`, in a run with this seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")
