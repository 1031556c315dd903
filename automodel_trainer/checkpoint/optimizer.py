"""Optimizer state as safetensors shards and JSON.

We do not use `torch.distributed.checkpoint.state_dict`: it runs an optimizer step to create the state before it loads,
needs state for every parameter, and pickles numbers. Here a state tensor is named after its parameter
(`0.model.norm.weight/exp_avg`), and missing state is created when it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import empty as empty_dtensor
from torch.optim import Optimizer

from automodel_trainer.checkpoint import quantized_state
from automodel_trainer.checkpoint.codec import decode, encode
from automodel_trainer.checkpoint.extra import filled, take_out
from automodel_trainer.checkpoint.given import Options, given_options, kept_options
from automodel_trainer.checkpoint.host_copies import Copy, keep
from automodel_trainer.checkpoint.manifest import OTHER, damage_named, read_json
from automodel_trainer.checkpoint.option_groups import GroupOptions, options_of_groups
from automodel_trainer.checkpoint.record import Entry, write_json, write_safetensors
from automodel_trainer.checkpoint.weights import MAX_FILE_BYTES, split_into_files
from automodel_trainer.distributed._dtensor import local_tensor, placeable, redistributed, shard_offsets
from automodel_trainer.distributed.agreement import gather, own_share, rank
from automodel_trainer.nn.text import listed
from automodel_trainer.nn.uneven import empty_like_shard, holds_nothing, is_uneven, placed_like

GROUPS = "groups.json"
NESTED = "nested.json"  # state that is a list or a dict (LBFGS keeps its history so); its tensors are stored by name
# State that is not an array is stored as a tensor of shape [1], with its kind as a suffix of the name.
_KINDS = {"0d": Tensor, "int": int, "float": float, "bool": bool}


@dataclass
class OptimizerSnapshot:
    """This rank's share of the state of all optimizers.

    Attributes:
        files: maps file names to this rank's shards by state name.
        offsets: maps state names to the offsets of the shard in the whole tensor.
        groups: parameter groups of each optimizer, on rank 0.
        quantized: maps names of quantized state to the facts needed to create it again, on rank 0.
        nested: maps names of lists and dicts to their content, on rank 0.
    """

    files: dict[str, dict[str, Tensor]]
    offsets: dict[str, list[int]]
    groups: list[dict[str, Any]] | None = None
    quantized: dict[str, Any] | None = None
    nested: dict[str, Any] | None = None

    def write(self, folder: Path) -> dict[str, Entry]:
        """Write the files into `folder` and return their entries. Not collective."""
        folder.mkdir(exist_ok=True)
        written = {}
        for name, tensors in self.files.items():
            where = {state: {"saved_offsets": self.offsets[state]} for state in tensors}
            metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(where)}
            written[name] = write_safetensors(folder / name, tensors, metadata)
        if self.groups is not None:
            written[GROUPS] = write_json(folder / GROUPS, self.groups)
        if self.quantized:
            written[quantized_state.SPECS] = write_json(folder / quantized_state.SPECS, self.quantized)
        if self.nested:
            written[NESTED] = write_json(folder / NESTED, self.nested)
        return written


def snapshot_optimizers(module: nn.Module, optimizers: Sequence[Optimizer], copy: Copy = keep) -> OptimizerSnapshot:
    """Take this rank's share of the optimizer state. Collective.

    If several ranks hold the same shard, one of them takes it. Ranks may hold different parameters (pipeline stages);
    rank 0 records the parameter groups of all of them.

    Args:
        module: the owner of the parameters; state is named after them.
        optimizers: the optimizers to save.
        copy: copies tensors to host memory, so that training can change the originals. The default makes no copy.

    Raises:
        ValueError: neither JSON nor safetensors can hold some state. The message names it.
    """
    tensors: dict[str, Tensor] = {}
    quantized: dict[str, Any] = {}
    nested: dict[str, Any] = {}
    for index, optimizer in enumerate(optimizers):
        for name, parameter in _named_parameters(module, optimizer).items():
            if holds_nothing(parameter):
                continue  # this rank counts no steps for it; other ranks have the state
            for key, value in optimizer.state.get(parameter, {}).items():
                state = f"{index}.{name}/{key}"
                if quantized_state.is_quantized(value):
                    quantized[state] = quantized_state.describe(state, value)
                    tensors.update(quantized_state.parts(state, value))
                elif isinstance(value, (list, dict)):
                    content, found = take_out(value, f"{state}#")
                    nested[state] = encode(content, state)
                    tensors.update(found)
                elif value is not None:
                    tensors.update(_stored(state, value, parameter))
    offsets = {name: _offsets(tensor) for name, tensor in tensors.items()}
    # Ranks that hold the same shard have the same name and offsets.
    shared = own_share(f"{name}@{offsets[name]}" for name in tensors)
    mine = {name: t for name, t in tensors.items() if f"{name}@{offsets[name]}" in shared and not _is_nothing(t)}
    copies = {name: copy(f"optimizer/{name}", local_tensor(tensor)) for name, tensor in mine.items()}
    gathered = gather(([_groups(module, optimizer) for optimizer in optimizers], quantized))
    groups = _united([groups for groups, _ in gathered])
    if rank() != 0:
        return OptimizerSnapshot(_files(copies), offsets)
    united = {k: v for _, held in gathered for k, v in held.items()}
    return OptimizerSnapshot(_files(copies), offsets, groups, united, nested)


def _offsets(tensor: Tensor) -> list[int]:
    """Offsets of this rank's part in the whole tensor."""
    return shard_offsets(tensor) if isinstance(tensor, DTensor) else [0] * tensor.dim()


def _is_nothing(tensor: Tensor) -> bool:
    """Whether this rank's part is empty although the whole tensor is not."""
    return local_tensor(tensor).numel() == 0 and tensor.numel() > 0


def _files(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    numbers = split_into_files({name: tensor.nbytes for name, tensor in tensors.items()}, MAX_FILE_BYTES)
    count = max(numbers.values(), default=0)
    files: dict[str, dict[str, Tensor]] = {}
    for name, number in numbers.items():
        file = f"shard-{rank() + 1:05d}-model-{number:05d}-of-{count:05d}.safetensors"
        files.setdefault(file, {})[name] = tensors[name]
    return files


def _united(ranks: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merge the parameter groups of all ranks. The groups are the same everywhere, but their parameters may differ."""
    united = ranks[0]
    for other in ranks[1:]:
        if [len(o["groups"]) for o in other] != [len(o["groups"]) for o in united]:
            raise ValueError(
                "The optimizers have different parameter groups on different ranks, which a checkpoint cannot hold. "
                "Create the same groups on every rank."
            )
        for ours, theirs in zip(united, other):
            for group, more in zip(ours["groups"], theirs["groups"]):
                group["parameters"] = list(dict.fromkeys([*group["parameters"], *more["parameters"]]))
                group["dtypes"] = {**group["dtypes"], **more["dtypes"]}
    return united


def load_optimizers(
    module: nn.Module, optimizers: Sequence[Optimizer], folder: Path, given: Sequence[Sequence[Options]] | None = None
) -> list[list[GroupOptions]]:
    """Read the state into the optimizers, sharded like their parameters. Collective.

    An option of a parameter group (`lr`, `betas`, …) that this run was given another value of than the run that wrote
    the checkpoint keeps its new value. Every other one goes on with its value in the checkpoint. The groups may hold
    other parameters than the saved ones: options and state go by the names of parameters.

    Args:
        module: the owner of the parameters.
        optimizers: the optimizers to fill; their state is replaced.
        folder: the optimizer folder of a checkpoint.
        given: what the groups of each optimizer were given in the run that wrote the checkpoint; None if not known.

    Returns:
        Of each group of each optimizer, what its parameters had in the checkpoint.

    Raises:
        ValueError: the folder is damaged, or the run has other optimizers or trains other parameters.
    """
    groups = _read_groups(folder / GROUPS)
    if len(groups) != len(optimizers):
        raise ValueError(
            f"{folder} holds the state of {len(groups)} optimizer(s), but the run has {len(optimizers)}. Resume with "
            "the optimizers that were saved."
        )
    saved: Mapping[str, Any] = {}
    reader = HuggingFaceStorageReader(str(folder))
    if any(folder.glob("*.safetensors")):  # a checkpoint from before the first step has no state
        saved = read_shapes(reader, folder)
    parameters, before = {}, []
    dtypes = {f"{i}.{n}": t for i, o in enumerate(groups) for g in o["groups"] for n, t in g["dtypes"].items()}
    here = _united(gather([_groups(module, optimizer) for optimizer in optimizers]))
    for index, (optimizer, now, group) in enumerate(zip(optimizers, here, groups)):
        before.append(_load_groups(optimizer, now, group, folder, given[index] if given else None))
        parameters.update({f"{index}.{n}": (optimizer, p) for n, p in _named_parameters(module, optimizer).items()})
        optimizer.state.clear()
    trained = {f"{i}.{name}" for i, now in enumerate(here) for group in now["groups"] for name in group["parameters"]}
    if unknown := {_owner(name) for name in saved} - trained:
        raise ValueError(
            f"{folder} holds state of {listed(sorted(unknown))}, which the run does not train. Resume with the same "
            "modules trained."
        )
    order = {owner: place for place, owner in enumerate(parameters)}
    states = quantized_state.empty_states(folder, parameters)
    # DCP reads into the parts of quantized state in place.
    inside = {
        name: part for state, value in states.items() for name, part in quantized_state.parts(state, value).items()
    }
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
        if "#" in key:
            continue
        if name in inside:
            key = key.partition("@")[0]
            optimizer.state[parameter][key] = states[f"{owner}/{key}"]
            continue
        key, _, kind = key.partition(":")
        if isinstance(tensor, DTensor) and tensor.shape == parameter.shape:
            tensor = _redistributed(tensor, parameter.placements)  # type: ignore[attr-defined]
        if not kind and tensor.is_floating_point() and _had_dtype_of_parameter(tensor, optimizer, dtypes.get(owner)):
            tensor = tensor.to(parameter.dtype)
        optimizer.state[parameter][key] = _restored(tensor, kind, _scalar_device(optimizer, parameter))
    if (folder / NESTED).is_file():
        _load_nested(decode(read_json(folder / NESTED), folder / NESTED), parameters, targets, folder)
    return before


def _load_nested(
    nested: Mapping[str, Any],
    parameters: Mapping[str, tuple[Optimizer, Tensor]],
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Restore lists and dicts of state, on the device of their parameter."""
    for name, content in nested.items():
        owner, _, key = name.rpartition("/")
        if owner in parameters:
            optimizer, parameter = parameters[owner]
            content = filled(content, tensors, folder)
            optimizer.state[parameter][key] = apply_to_collection(content, Tensor, Tensor.to, parameter.device)


def _named_parameters(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in names for parameter in parameters)
    if foreign:
        raise ValueError(
            f"{type(optimizer).__name__} trains {foreign} parameter(s) that {type(module).__name__} does not own, so a "
            "checkpoint cannot name them. Register them on the module."
        )
    return {names[id(parameter)]: parameter for parameter in parameters}


def _groups(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        dtypes = {names[id(parameter)]: str(parameter.dtype) for parameter in group["params"]}
        options = encode(options, f"param_groups[{number}]")
        groups.append({"parameters": list(dtypes), "dtypes": dtypes, "options": options})
    return {"optimizer": type(optimizer).__name__, "groups": groups}


def _read_groups(file: Path) -> list[dict[str, Any]]:
    saved = decode(read_json(file), file)
    with damage_named(file):
        return [
            {
                "optimizer": optimizer["optimizer"],
                "groups": [
                    {
                        "parameters": set(g["parameters"]),
                        "dtypes": dict(g.get("dtypes", {})),  # older checkpoints have none
                        "options": {**g["options"]},
                    }
                    for g in optimizer["groups"]
                ],
            }
            for optimizer in saved
        ]


def _owner(state: str) -> str:
    """Name of the parameter that some state belongs to: `0.model.norm.weight` for `0.model.norm.weight/exp_avg`."""
    return state.rpartition("/")[0]


def read_shapes(reader: HuggingFaceStorageReader, folder: Path) -> Mapping[str, Any]:
    """Read the shapes and shards of the tensors on disk. They are checked before any memory is allocated.

    Args:
        reader: a DCP reader of the folder.
        folder: the folder, for error messages.

    Returns:
        Maps tensor names to DCP's metadata.

    Raises:
        ValueError: the metadata is damaged, or the shards do not add up to the tensors.
    """
    try:
        saved: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{folder} is damaged: the positions of its shards cannot be read ({error!r}). {OTHER}"
        ) from error
    for name, entry in saved.items():
        pieces = {tuple(chunk.offsets): math.prod(chunk.sizes) for chunk in entry.chunks}
        if any(offset < 0 for offsets in pieces for offset in offsets) or sum(pieces.values()) != math.prod(entry.size):
            raise ValueError(
                f"{folder} is damaged: the shards of {name} do not add up to its shape {list(entry.size)}. {OTHER}"
            )
    return saved


def _load_groups(
    optimizer: Optimizer,
    now: Mapping[str, Any],
    saved: Mapping[str, Any],
    folder: Path,
    given_then: Sequence[Options] | None,
) -> list[GroupOptions]:
    """Set the options of an optimizer's groups. Returns what these groups had in the checkpoint."""
    if now["optimizer"] != saved["optimizer"]:
        raise ValueError(
            f"{folder} holds state of {saved['optimizer']}, but the run uses {now['optimizer']}. Resume with "
            f"{saved['optimizer']}, or start a new run from the checkpoint's weights (fit(resume='weights'))."
        )
    trained = {name for group in now["groups"] for name in group["parameters"]}
    before = {name for group in saved["groups"] for name in group["parameters"]}
    if difference := trained ^ before:
        raise ValueError(
            f"{folder}: {listed(sorted(difference))} is trained in only one of this run and the checkpoint's. Resume "
            "with the same modules frozen, or start a new run from the checkpoint's weights: fit(resume='weights'), "
            "--resume weights."
        )
    given = given_options(optimizer)
    found = options_of_groups(now["groups"], saved["groups"], given_then)
    for i, (group, options) in enumerate(zip(optimizer.param_groups, found)):
        # A group that a callback added later (BackboneFinetuning) was given nothing by the user.
        now_given = given[i] if given and i < len(given) else None
        group.update(kept_options(options.saved, options.then, now_given))
    return found


def _stored(name: str, value: Any, parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(value, Tensor) and value.dim():
        if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
            raise ValueError(
                f"The optimizer state {name} is not a DTensor, but its parameter is, so we do not know how it is "
                "sharded and cannot save it. Use an optimizer that creates its state with torch.zeros_like."
            )
        if not isinstance(value, DTensor):
            return {name: value.detach().contiguous()}
        return {name: placed_like(_placeable(value).detach(), parameter)}
    for kind, python in _KINDS.items():
        if isinstance(value, Tensor) if kind == "0d" else type(value) is python:
            plain = value.full_tensor() if isinstance(value, DTensor) else value
            dtype = torch.float64 if kind == "float" else None  # the precision of a Python float
            return {f"{name}:{kind}": torch.as_tensor(plain, dtype=dtype).detach().reshape(1)}
    raise ValueError(
        f"The optimizer state {name} is a {type(value).__name__}, but a checkpoint can hold only tensors and numbers."
    )


def _target(name: str, size: tuple[int, ...], dtype: torch.dtype, parameter: Tensor) -> Tensor:
    """An empty tensor to read the state `name` into: sharded like its parameter, or replicated if shapes differ."""
    if ":" in name.rpartition("/")[2]:
        return torch.empty(size, dtype=dtype)
    if is_uneven(parameter) and size == tuple(parameter.shape):
        return empty_like_shard(parameter, dtype)
    if isinstance(parameter, DTensor):
        same = size == tuple(parameter.shape)
        placements = placeable(parameter) if same else (Replicate(),) * parameter.device_mesh.ndim
        state = empty_dtensor(*size, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)
        return state.to(parameter.device)  # with CPU offload the mesh is of GPUs, but shards lie in host memory
    return torch.empty(size, dtype=dtype, device=parameter.device)


def _placeable(value: DTensor) -> DTensor:
    return _redistributed(value, placeable(value))


def _redistributed(value: DTensor, placements: tuple[Placement, ...]) -> DTensor:
    if value.placements == placements:
        return value
    on_mesh = value.to(value.device_mesh.device_type)  # with CPU offload: NCCL needs it on the GPU
    return redistributed(on_mesh, placements).to(value.device)  # type: ignore[arg-type,return-value]


def _had_dtype_of_parameter(tensor: Tensor, optimizer: Optimizer, dtype: str | None) -> bool:
    """Whether saved state follows the dtype of its parameter (`dtype` when it was saved), and has no dtype of its own.

    The precision of a run may change. torch's optimizers then need state in the new one; others may keep fp32 for
    parameters in bf16, and that stays.
    """
    if dtype is None:  # an older checkpoint
        return isinstance(optimizer, getattr(torch.optim, type(optimizer).__name__, ()))
    return str(tensor.dtype) == dtype


def _restored(tensor: Tensor, kind: str, device: torch.device) -> Any:
    if not kind:
        return tensor
    return tensor.reshape(()).to(device) if kind == "0d" else _KINDS[kind](tensor.item())


def _scalar_device(optimizer: Optimizer, parameter: Tensor) -> torch.device:
    """The device on which torch's optimizers keep the step count of a parameter."""
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return parameter.device if on_device else torch.device("cpu")
