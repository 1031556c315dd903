"""Optimizer state in 8 or 4 bits (torchao's optimizers): stored as the tensors that it is packed into, bit for bit."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from automodel_trainer.checkpoint.manifest import damage_named, read_json

PACKED = "packed.json"
_TABLES = ("qmap",)  # the same for every state: made anew


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def is_packed(value: Any) -> bool:
    """Whether a value of optimizer state is a tensor packed into others."""
    return isinstance(value, Tensor) and hasattr(local_part(value), "__tensor_flatten__")


def describe(name: str, value: Tensor) -> dict[str, Any]:
    """How to make an empty one. Raises ValueError for a packing that is not known, or not cut evenly."""
    local = local_part(value)
    kind = f"{type(local).__module__}.{type(local).__qualname__}"
    if not kind.startswith("torchao.") or not hasattr(local, "block_size"):
        raise ValueError(f"The optimizer state {name} is a {kind}, which a checkpoint cannot hold.")
    if isinstance(value, DTensor) and value.shape[0] % _shards(value):
        raise ValueError(
            f"The optimizer state {name} of shape {list(value.shape)} is packed, and {_shards(value)} ranks cannot "
            "share it evenly: a checkpoint cannot hold it. Use an optimizer in full precision, or fewer ranks."
        )
    signed = {"signed": bool(local.signed)} if hasattr(local, "signed") else {}
    return {"class": kind, "block_size": int(local.block_size), **signed}


def parts(name: str, value: Tensor) -> dict[str, Tensor]:
    """The tensors inside by `name@part`, cut as the state is."""
    local = local_part(value)
    names, _ = local.__tensor_flatten__()  # type: ignore[attr-defined]
    inside = {part: getattr(local, part) for part in names if part not in _TABLES}
    if isinstance(value, DTensor):
        mesh, placements = value.device_mesh, value.placements
        inside = {part: DTensor.from_local(t, mesh, placements, run_check=False) for part, t in inside.items()}
    return {f"{name}@{part}": tensor for part, tensor in inside.items()}


def empty_states(folder: Path, parameters: Mapping[str, tuple[Any, Tensor]]) -> dict[str, Tensor]:
    """Empty packed state for all that `folder` holds, laid out as the parameters are.

    Args:
        folder: an optimizer's checkpoint.
        parameters: by their names in it, with their optimizers.

    Raises:
        ValueError: torchao is not installed, or the parameter's shards end inside of a block.
    """
    if not (folder / PACKED).is_file():
        return {}
    specs = read_json(folder / PACKED)
    with damage_named(folder / PACKED):
        known = {name: dict(spec) for name, spec in specs.items() if name.rpartition("/")[0] in parameters}
        return {name: _empty(name, spec, parameters[name.rpartition("/")[0]][1]) for name, spec in known.items()}


def _empty(name: str, spec: Mapping[str, Any], parameter: Tensor) -> Tensor:
    local = local_part(parameter)
    shards = _shards(parameter) if isinstance(parameter, DTensor) else 1
    if local.numel() % spec["block_size"] or parameter.shape[0] % shards:
        raise ValueError(
            f"{name} was saved in blocks of {spec['block_size']}, and a shard of {list(local.shape)} ends inside of "
            "one: resume on as many ranks as wrote it."
        )
    options = {key: spec[key] for key in ("signed", "block_size") if key in spec}
    state = _class(spec["class"]).zeros(local.shape, device=local.device, **options)
    if not isinstance(parameter, DTensor):
        return state
    return DTensor.from_local(
        state,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if not path.startswith("torchao.optim."):  # a checkpoint names no code of its own
        raise ValueError(f"{path} is not a packing of torchao's optimizers.")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The checkpoint holds torchao's {name}: install the version that wrote it.") from error
    if not (isinstance(found, type) and issubclass(found, Tensor)):
        raise ValueError(f"{path} is not a packing of torchao's optimizers.")
    return found


def _shards(tensor: DTensor) -> int:
    odd = [p for p in tensor.placements if not isinstance(p, Replicate) and p != Shard(0)]
    if odd:
        raise ValueError(f"Packed optimizer state cut as {odd} cannot be saved: use an optimizer in full precision.")
    return math.prod(
        tensor.device_mesh.size(axis) for axis, placement in enumerate(tensor.placements) if placement == Shard(0)
    )
