"""Optimizer state as safetensors shards and JSON.

`torch.distributed.checkpoint.state_dict` could name the state too, but it takes an optimizer step of its own to make
the state exist before it loads, needs every parameter to have state, and leaves numbers to a pickle. Here a state
tensor is named after its parameter (`0.model.norm.weight/exp_avg`), and state that is not there yet is made as it is
read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import empty as empty_dtensor
from torch.optim import Optimizer

from automodel_trainer.checkpoint import packed
from automodel_trainer.checkpoint.codec import decode, encode
from automodel_trainer.checkpoint.host_copies import Copy, keep
from automodel_trainer.checkpoint.manifest import damage_named, read_json
from automodel_trainer.checkpoint.record import Entry, write_json, write_safetensors
from automodel_trainer.checkpoint.weights import MAX_FILE_BYTES, some, split_into_files
from automodel_trainer.distributed._dtensor import placeable
from automodel_trainer.distributed.agreement import gather, on_all_ranks, own_share, rank
from automodel_trainer.nn.uneven import empty_like_shard, holds_nothing, is_uneven, placed_like

GROUPS = "groups.json"
# How state that is no array is told apart in a file of arrays: each is stored with the shape [1].
_KINDS = {"0d": Tensor, "int": int, "float": float, "bool": bool}


@dataclass
class OptimizerStates:
    """This rank's shards of the state of all optimizers, and what rank 0 writes beside them."""

    files: dict[str, dict[str, Tensor]]
    offsets: dict[str, list[int]]
    groups: list[dict[str, Any]] | None = None
    packings: dict[str, Any] | None = None

    def write(self, folder: Path) -> dict[str, Entry]:
        """Write the files into `folder`; returns their entries. Not collective: nobody waits for another rank."""
        folder.mkdir(exist_ok=True)
        written = {}
        for name, tensors in self.files.items():
            where = {state: {"saved_offsets": self.offsets[state]} for state in tensors}
            metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(where)}
            written[name] = write_safetensors(folder / name, tensors, metadata)
        if self.groups is not None:
            written[GROUPS] = write_json(folder / GROUPS, self.groups)
        if self.packings:
            written[packed.PACKED] = write_json(folder / packed.PACKED, self.packings)
        return written


def save_optimizers(module: nn.Module, optimizers: Sequence[Optimizer], folder: Path) -> None:
    """Write the state of all optimizers: each rank its own shards, rank 0 the parameter groups. Collective."""
    on_all_ranks(partial(stage_optimizers(module, optimizers).write, folder), folder)


def stage_optimizers(module: nn.Module, optimizers: Sequence[Optimizer], copy: Copy = keep) -> OptimizerStates:
    """Take this rank's part of the state: of what several ranks hold alike, one takes it. Collective.

    Ranks may hold different parameters (pipeline stages); rank 0 takes note of all of them.

    Args:
        module: owns the parameters; state is named after them.
        optimizers: those whose state is saved.
        copy: makes a copy in host memory that training does not change; by default tensors are left where they are.

    Raises:
        ValueError: state that neither JSON nor safetensors can hold; the message names it.
    """
    tensors: dict[str, Tensor] = {}
    packings: dict[str, Any] = {}
    for index, optimizer in enumerate(optimizers):
        for name, parameter in _named_parameters(module, optimizer).items():
            if holds_nothing(parameter):
                continue  # no step of such a parameter is counted here: other ranks have the state
            for key, value in optimizer.state.get(parameter, {}).items():
                state = f"{index}.{name}/{key}"
                if packed.is_packed(value):
                    packings[state] = packed.describe(state, value)
                    tensors.update(packed.parts(state, value))
                elif value is not None:
                    tensors.update(_stored(state, value, parameter))
    offsets = {name: _offsets(tensor) for name, tensor in tensors.items()}
    shared = own_share(f"{name}@{offsets[name]}" for name in tensors)
    mine = {name: t for name, t in tensors.items() if f"{name}@{offsets[name]}" in shared and not _is_nothing(t)}
    staged = {name: copy(f"optimizer/{name}", packed.local_part(tensor)) for name, tensor in mine.items()}
    gathered = gather(([_groups(module, optimizer) for optimizer in optimizers], packings))
    groups = _united([groups for groups, _ in gathered])
    if rank() != 0:
        return OptimizerStates(_files(staged), offsets)
    return OptimizerStates(_files(staged), offsets, groups, {k: v for _, held in gathered for k, v in held.items()})


def _offsets(tensor: Tensor) -> list[int]:
    """Where this rank's part of a tensor begins. (What FSDP2 shards on top of tensor parallelism is one piece too.)"""
    if not isinstance(tensor, DTensor):
        return [0] * tensor.dim()
    return list(tensor.__create_chunk_list__()[0].offsets)


def _is_nothing(tensor: Tensor) -> bool:
    """Whether this rank's part is empty because others have it all."""
    return packed.local_part(tensor).numel() == 0 and tensor.numel() > 0


def _files(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    numbers = split_into_files({name: tensor.nbytes for name, tensor in tensors.items()}, MAX_FILE_BYTES)
    count = max(numbers.values(), default=0)
    files: dict[str, dict[str, Tensor]] = {}
    for name, number in numbers.items():
        file = f"shard-{rank() + 1:05d}-model-{number:05d}-of-{count:05d}.safetensors"
        files.setdefault(file, {})[name] = tensors[name]
    return files


def _united(ranks: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The parameter groups of all ranks: the same groups everywhere, of parameters that may lie on different ranks."""
    united = ranks[0]
    for other in ranks[1:]:
        if [len(o["groups"]) for o in other] != [len(o["groups"]) for o in united]:
            raise ValueError("The ranks' optimizers have different parameter groups: a checkpoint cannot hold them.")
        for ours, theirs in zip(united, other):
            for group, more in zip(ours["groups"], theirs["groups"]):
                group["parameters"] = list(dict.fromkeys([*group["parameters"], *more["parameters"]]))
    return united


def load_optimizers(module: nn.Module, optimizers: Sequence[Optimizer], folder: Path) -> None:
    """Read the state into the optimizers, sharded as their parameters are. Collective.

    Raises:
        ValueError: other optimizers, parameter groups or parameters than those that were saved.
    """
    groups = _read_groups(folder / GROUPS)
    if len(groups) != len(optimizers):
        raise ValueError(f"{folder} holds the state of {len(groups)} optimizer(s), but the run has {len(optimizers)}.")
    saved: Mapping[str, Any] = {}
    reader = HuggingFaceStorageReader(str(folder))
    if any(folder.glob("*.safetensors")):  # none before the first step
        saved = read_shapes(reader, folder)
    parameters = {}
    here = _united(gather([_groups(module, optimizer) for optimizer in optimizers]))
    for index, (optimizer, now, group) in enumerate(zip(optimizers, here, groups)):
        _load_groups(optimizer, now, group, folder)
        parameters.update({f"{index}.{n}": (optimizer, p) for n, p in _named_parameters(module, optimizer).items()})
        optimizer.state.clear()
    trained = {f"{i}.{name}" for i, now in enumerate(here) for group in now["groups"] for name in group["parameters"]}
    if unknown := {_owner(name) for name in saved} - trained:
        raise ValueError(f"{folder} holds state of {some(unknown)}, which the run does not train.")
    order = {owner: place for place, owner in enumerate(parameters)}
    states = packed.empty_states(folder, parameters)
    inside = {name: part for state, value in states.items() for name, part in packed.parts(state, value).items()}
    targets = {
        name: inside[name]
        if name in inside
        else _target(name, tuple(saved[name].size), saved[name].properties.dtype, parameters[_owner(name)][1])
        for name in sorted((name for name in saved if _owner(name) in order), key=lambda name: order[_owner(name)])
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


def _read_groups(file: Path) -> list[dict[str, Any]]:
    saved = decode(read_json(file), file)
    with damage_named(file):
        return [
            {
                "optimizer": optimizer["optimizer"],
                "groups": [
                    {"parameters": set(g["parameters"]), "options": {**g["options"]}} for g in optimizer["groups"]
                ],
            }
            for optimizer in saved
        ]


def _owner(state: str) -> str:
    """The parameter that `0.model.norm.weight/exp_avg` is state of."""
    return state.rpartition("/")[0]


def read_shapes(reader: HuggingFaceStorageReader, folder: Path) -> Mapping[str, Any]:
    """Shapes and pieces of the tensors on disk, checked before memory is taken: the pieces make up the tensors.

    Raises:
        ValueError: they do not, or what says where they belong is damaged.
    """
    try:
        saved: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{folder} is damaged: where its shards belong cannot be read ({error!r}).") from error
    for name, entry in saved.items():
        pieces = {tuple(chunk.offsets): math.prod(chunk.sizes) for chunk in entry.chunks}
        if any(offset < 0 for offsets in pieces for offset in offsets) or sum(pieces.values()) != math.prod(entry.size):
            raise ValueError(
                f"{folder} is damaged: {name} of shape {list(entry.size)} is not made up of its pieces on disk."
            )
    return saved


def _load_groups(optimizer: Optimizer, now: Mapping[str, Any], saved: Mapping[str, Any], folder: Path) -> None:
    if now["optimizer"] != saved["optimizer"]:
        raise ValueError(f"{folder} holds state of {saved['optimizer']}, but the run uses {now['optimizer']}.")
    if len(now["groups"]) != len(saved["groups"]):
        raise ValueError(f"{folder} holds {len(saved['groups'])} parameter groups; the run has {len(now['groups'])}.")
    for group, own, other in zip(optimizer.param_groups, now["groups"], saved["groups"]):
        if difference := set(own["parameters"]) ^ other["parameters"]:
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
        if not isinstance(value, DTensor):
            return {name: value.detach().contiguous()}
        return {name: placed_like(_placeable(value).detach(), parameter)}
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
    if is_uneven(parameter) and size == tuple(parameter.shape):
        return empty_like_shard(parameter, dtype)
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
