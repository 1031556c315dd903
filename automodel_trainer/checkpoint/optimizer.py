"""Optimizer state as safetensors shards and JSON.

`torch.distributed.checkpoint.state_dict` could name the state too, but it takes an optimizer step of its own to make
the state exist before it loads, needs every parameter to have state, and leaves numbers to a pickle. Here a state
tensor is named after its parameter (`0.model.norm.weight/exp_avg`), and state that is not there yet is made as it is
read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import empty as empty_dtensor
from torch.optim import Optimizer

from automodel_trainer.checkpoint import packed
from automodel_trainer.checkpoint.agreement import rank, world_size
from automodel_trainer.checkpoint.codec import decode, encode
from automodel_trainer.checkpoint.folder import write_json
from automodel_trainer.checkpoint.weights import MAX_FILE_BYTES, some, split_into_files
from automodel_trainer.strategies._torch import placeable

GROUPS = "groups.json"
# How state that is no array is told apart in a file of arrays: each is stored with the shape [1].
_KINDS = {"0d": Tensor, "int": int, "float": float, "bool": bool}


def save_optimizers(module: nn.Module, optimizers: Sequence[Optimizer], folder: Path) -> None:
    """Write the state of all optimizers: each rank its own shards, rank 0 the parameter groups. Collective."""
    tensors: dict[str, Tensor] = {}
    packings: dict[str, Any] = {}
    for index, optimizer in enumerate(optimizers):
        for name, parameter in _named_parameters(module, optimizer).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                state = f"{index}.{name}/{key}"
                if packed.is_packed(value):
                    packings[state] = packed.describe(state, value)
                    tensors.update(packed.parts(state, value))
                elif value is not None:
                    tensors.update(_stored(state, value, parameter))
    folder.mkdir(exist_ok=True)
    if rank() == 0:
        write_json(folder / GROUPS, [_groups(module, optimizer) for optimizer in optimizers])
        if packings:
            write_json(folder / packed.PACKED, packings)
    if tensors:
        # DCP places shards by their offsets, those of FSDP2 on top of tensor parallelism (_StridedShard) too.
        files = split_into_files(tensors, MAX_FILE_BYTES * world_size())
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        dcp.save(tensors, storage_writer=writer)


def load_optimizers(module: nn.Module, optimizers: Sequence[Optimizer], folder: Path) -> None:
    """Read the state into the optimizers, sharded as their parameters are. Collective.

    Raises:
        ValueError: other optimizers, parameter groups or parameters than those that were saved.
    """
    groups = decode(json.loads((folder / GROUPS).read_text()))
    if len(groups) != len(optimizers):
        raise ValueError(f"{folder} holds the state of {len(groups)} optimizer(s), but the run has {len(optimizers)}.")
    saved: Mapping[str, Any] = {}
    reader = HuggingFaceStorageReader(str(folder))
    if any(folder.glob("*.safetensors")):  # none before the first step
        saved = reader.read_metadata().state_dict_metadata
    parameters = {}
    for index, (optimizer, group) in enumerate(zip(optimizers, groups)):
        _load_groups(module, optimizer, group, folder)
        parameters.update({f"{index}.{n}": (optimizer, p) for n, p in _named_parameters(module, optimizer).items()})
        optimizer.state.clear()
    if unknown := {name.rpartition("/")[0] for name in saved} - parameters.keys():
        raise ValueError(f"{folder} holds state of {some(unknown)}, which the run does not train.")
    order = {owner: place for place, owner in enumerate(parameters)}
    states = packed.empty_states(folder, parameters)
    inside = {name: part for state, value in states.items() for name, part in packed.parts(state, value).items()}
    targets = {
        name: inside[name]
        if name in inside
        else _target(
            name, tuple(saved[name].size), saved[name].properties.dtype, parameters[name.rpartition("/")[0]][1]
        )
        for name in sorted(saved, key=lambda name: order[name.rpartition("/")[0]])
    }
    if targets:
        dcp.load(dict(targets), storage_reader=reader)
    for name, tensor in targets.items():
        owner, _, key = name.rpartition("/")
        optimizer, parameter = parameters[owner]
        if name in inside:
            key = key.partition("@")[0]
            optimizer.state[parameter][key] = states[f"{owner}/{key}"]
            continue
        key, _, kind = key.partition(":")
        if isinstance(tensor, DTensor) and tensor.shape == parameter.shape:
            tensor = _redistributed(tensor, parameter.placements)  # type: ignore[attr-defined]
        optimizer.state[parameter][key] = _restored(tensor, kind, _scalar_device(optimizer, parameter))


def _named_parameters(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in names for parameter in parameters)
    if foreign:
        raise ValueError(
            f"{type(optimizer).__name__} trains {foreign} parameter(s) that {type(module).__name__} does not own, so a "
            "checkpoint could not name them. Register them on the module."
        )
    return {names[id(parameter)]: parameter for parameter in parameters}


def _groups(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        named = [names[id(parameter)] for parameter in group["params"]]
        groups.append({"parameters": named, "options": encode(options, f"param_groups[{number}]")})
    return {"optimizer": type(optimizer).__name__, "groups": groups}


def _load_groups(module: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any], folder: Path) -> None:
    now = _groups(module, optimizer)
    if now["optimizer"] != saved["optimizer"]:
        raise ValueError(f"{folder} holds state of {saved['optimizer']}, but the run uses {now['optimizer']}.")
    if len(now["groups"]) != len(saved["groups"]):
        raise ValueError(f"{folder} holds {len(saved['groups'])} parameter groups; the run has {len(now['groups'])}.")
    for group, own, other in zip(optimizer.param_groups, now["groups"], saved["groups"]):
        if difference := set(own["parameters"]) ^ set(other["parameters"]):
            raise ValueError(
                f"{folder}: {some(difference)} is trained, or grouped, otherwise than in this run. Resume with the "
                "same modules frozen and the same weight-decay groups."
            )
        group.update(other["options"])


def _stored(name: str, value: Any, parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(value, Tensor) and value.dim():
        if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
            raise ValueError(
                f"The optimizer state {name} is not a DTensor though its parameter is: it cannot be saved."
            )
        return {name: _placeable(value).detach() if isinstance(value, DTensor) else value.detach().contiguous()}
    for kind, python in _KINDS.items():
        if isinstance(value, Tensor) if kind == "0d" else type(value) is python:
            plain = value.full_tensor() if isinstance(value, DTensor) else value
            dtype = torch.float64 if kind == "float" else None
            return {f"{name}:{kind}": torch.as_tensor(plain, dtype=dtype).detach().reshape(1)}
    raise ValueError(f"The optimizer state {name} is a {type(value).__name__}; a checkpoint holds tensors and numbers.")


def _target(name: str, size: tuple[int, ...], dtype: torch.dtype, parameter: Tensor) -> Tensor:
    """Where the state tensor `name` is read into: laid out as its parameter, or whole where its shape is another."""
    if ":" in name.rpartition("/")[2]:
        return torch.empty(size, dtype=dtype)
    if isinstance(parameter, DTensor):
        same = size == tuple(parameter.shape)
        placements = placeable(parameter) if same else (Replicate(),) * parameter.device_mesh.ndim
        state = empty_dtensor(*size, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)
        return state.to(parameter.device)  # a mesh of GPUs, but shards in host memory: CPU offload
    return torch.empty(size, dtype=dtype, device=parameter.device)


def _placeable(value: DTensor) -> DTensor:
    return _redistributed(value, placeable(value))


def _redistributed(value: DTensor, placements: tuple[Placement, ...]) -> DTensor:
    if value.placements == placements:
        return value
    on_mesh = value.to(value.device_mesh.device_type)  # CPU offload: off the host
    return on_mesh.redistribute(placements=placements).to(value.device)  # type: ignore[attr-defined]


def _restored(tensor: Tensor, kind: str, device: torch.device) -> Any:
    if not kind:
        return tensor
    return tensor.reshape(()).to(device) if kind == "0d" else _KINDS[kind](tensor.item())


def _scalar_device(optimizer: Optimizer, parameter: Tensor) -> torch.device:
    """Where torch's optimizers keep a parameter's step count."""
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return parameter.device if on_device else torch.device("cpu")
