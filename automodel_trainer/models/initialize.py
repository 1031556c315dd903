"""Random weights that do not depend on the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from automodel_trainer.models._transformers import (
    forget_initialized,
    initialize_module,
    is_loaded,
    mark_loaded,
    tie_weights,
)
from automodel_trainer.nn.text import listed


@torch.no_grad()
def initialize_weights(
    model: PreTrainedModel, device: torch.device, seed: int, added: Collection[str] = frozenset(), strict: bool = True
) -> None:
    """Give a model on meta random weights on `device`, by the model's own rules.

    Every module draws with a seed made of `seed` and its name. A sharded module draws its full parameters and keeps its
    shards. So every layout gets the same values, and no rank holds more than one module's full parameters.

    Args:
        added: names of parameters that are not the model's own (adapters), for which it needs no rule.
        strict: False fills parameters with zeros for which the model has no rule.

    Raises:
        ValueError: the model has no rule for some of its parameters.
    """
    model.to_empty(device=device)
    for _, buffer in _own_buffers(model):
        buffer.fill_(_unset(buffer.dtype))
    drawn: set[int] = set()  # a tied weight is drawn once, by the first module that holds it
    left: list[str] = []
    for name, module in model.named_modules():
        own = {_joined(name, k): p for k, p in module.named_parameters(recurse=False) if id(p) not in drawn}
        drawn |= {id(p) for p in own.values()}
        if own and own.keys() <= set(added):
            continue  # a rule that goes by names would take an adapter for the layer that it adapts
        if own or dict(module.named_buffers(recurse=False)):
            left += _draw(model, module, own, device, seed_of(seed, name))
    left = _draw_by_parents(model, [name for name in left if name not in added], device, seed)
    _fill_buffers_by_parents(model, device, seed)
    buffers = {name: b for name, b in _own_buffers(model) if _is_unset(b)}
    if strict:
        _refuse(model, [*left, *buffers])
    for tensor in (*map(model.get_parameter, left), *buffers.values()):
        tensor.zero_()
    tie_weights(model)


@torch.no_grad()
def initialize_missing(model: PreTrainedModel, names: Collection[str], device: torch.device, seed: int = 0) -> None:
    """Draw parameters that a checkpoint lacks, as `initialize_weights` draws them: the same under any layout.

    Args:
        model: laid out, with real parameters.
        names: of the parameters to draw. A module is skipped unless all of its own parameters are in it.
        device: of the parameters.
        seed: of the random weights.

    Raises:
        ValueError: the model has no rule for some of them.
    """
    left: list[str] = []
    for name in sorted({name.rpartition(".")[0] for name in names}):
        module = model.get_submodule(name)
        own = {_joined(name, key): parameter for key, parameter in module.named_parameters(recurse=False)}
        if own.keys() <= set(names):
            forget_initialized(module)
            left += _draw(model, module, own, device, seed_of(seed, name))
    _refuse(model, _draw_by_parents(model, left, device, seed))


def _draw_by_parents(model: PreTrainedModel, names: Sequence[str], device: torch.device, seed: int) -> list[str]:
    """Fill parameters that a module around their own has the rule for; the innermost is asked first.

    Returns:
        names of those that no rule fills.
    """
    left = list(names)
    for depth in range(1, max((name.count(".") for name in names), default=0) + 1):
        for parent in sorted({".".join(name.split(".")[: -1 - depth]) for name in left if name.count(".") >= depth}):
            module = model.get_submodule(parent)
            own = {n: model.get_parameter(n) for n in left if n.startswith(f"{parent}." if parent else "")}
            own = {n: p for n, p in own.items() if n.count(".") - parent.count(".") - bool(parent) >= depth}
            rest = [p for p in module.parameters() if not any(p is q for q in own.values()) and not is_loaded(p)]
            for parameter in rest:  # the parent's rule is not for what has been drawn
                mark_loaded(parameter, True)
            still = _draw(model, module, own, device, seed_of(seed, parent))
            for parameter in rest:
                mark_loaded(parameter, False)
            left = [name for name in left if name not in own or name in still]
    return left


def _fill_buffers_by_parents(model: PreTrainedModel, device: torch.device, seed: int) -> None:
    """Fill buffers that a module around their own has the rule for; the innermost is asked first."""
    left = [name for name, buffer in _own_buffers(model) if _is_unset(buffer)]
    if not left:
        return
    drawn = [parameter for parameter in model.parameters() if not is_loaded(parameter)]
    for parameter in drawn:
        mark_loaded(parameter, True)
    while left := [".".join(name.split(".")[:-1]) for name in left if name]:
        for parent in sorted(set(left)):
            _draw(model, model.get_submodule(parent), {}, device, seed_of(seed, parent))
        left = [name for name in left if any(_is_unset(b) for _, b in _own_buffers(model.get_submodule(name)))]
    for parameter in drawn:
        mark_loaded(parameter, False)


def _refuse(model: PreTrainedModel, left: Sequence[str]) -> None:
    if left:
        raise ValueError(
            f"{type(model).__name__} has no rule to draw random values of {listed(left, 5)}. Start from a checkpoint "
            "that holds them (from_pretrained)."
        )


def _draw(
    model: PreTrainedModel, module: nn.Module, own: dict[str, nn.Parameter], device: torch.device, seed: int
) -> list[str]:
    """Let `module` fill the parameters `own` of the model, by name; of a sharded one draw the whole, keep the shard.

    Returns:
        names of those that its rule leaves alone.
    """
    places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in own}
    for name, parameter in own.items():
        owner, key = places[name]
        if isinstance(parameter, DTensor):
            owner._parameters[key] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
        whole = owner._parameters[key]
        assert whole is not None
        if _is_plain(whole):
            whole.fill_(torch.nan)
    others = [p for p in module.parameters(recurse=False) if not is_loaded(p)]
    tied = [p for p in others if not any(p is owner._parameters[key] for owner, key in places.values())]
    for parameter in tied:  # the first module that holds it has drawn it
        mark_loaded(parameter, True)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _seed(seed, device)
        initialize_module(model, module)
    for parameter in tied:
        mark_loaded(parameter, False)
    left = []
    for name, parameter in own.items():
        owner, key = places[name]
        full = owner._parameters[key]
        assert full is not None
        left += [name] if _is_plain(full) and full.isnan().any() else []
        if isinstance(parameter, DTensor):
            shard = distribute_tensor(full.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(shard.to_local())
            owner._parameters[key] = parameter
    return left


def _seed(seed: int, device: torch.device) -> None:
    """Seed what draws on `device`.

    `torch.manual_seed` also notes the call and the stack for every kind of device that is not there: that takes longer
    than to draw a small layer, and is kept.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _own_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers that hold numbers, by name: one that was not filled shows."""
    return [(name, buffer) for name, buffer in model.named_buffers() if buffer.dtype is not torch.bool]


def _unset(dtype: torch.dtype) -> float | int:
    return torch.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min


def _is_unset(buffer: torch.Tensor) -> bool:
    holds_nan = buffer.is_floating_point() or buffer.is_complex()
    missing = buffer.isnan() if holds_nan else buffer == _unset(buffer.dtype)
    return bool(missing.any())


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers as they are: a quantized one holds codes."""
    return tensor.is_floating_point() and not hasattr(tensor, "__tensor_flatten__")


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def seed_of(seed: int, name: str) -> int:
    """The seed for the module or adapter `name`, in a run with this seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")
