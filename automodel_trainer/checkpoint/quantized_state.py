"""Optimizer state in 8 or 4 bits (torchao's optimizers). We store the tensors inside it, bit for bit."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from automodel_trainer.checkpoint.manifest import damage_named, read_json
from automodel_trainer.distributed._dtensor import local_tensor

SPECS = "packed.json"
"""The file in a checkpoint that says how to create each quantized state tensor."""
_TABLES = ("qmap",)  # code tables, the same for every state of a class: not stored


def is_quantized(value: Any) -> bool:
    """Whether a value of optimizer state is a tensor subclass that holds other tensors (codes and scales)."""
    return isinstance(value, Tensor) and hasattr(local_tensor(value), "__tensor_flatten__")


def describe(name: str, value: Tensor) -> dict[str, Any]:
    """The class and options to create an empty tensor like `value`.

    Args:
        name: name of the state, for error messages.
        value: quantized optimizer state of any shape.

    Raises:
        ValueError: the class is unknown, or the state is not sharded evenly along its first dimension.
    """
    local = local_tensor(value)
    kind = f"{type(local).__module__}.{type(local).__qualname__}"
    if not kind.startswith("torchao.") or not hasattr(local, "block_size"):
        raise ValueError(
            f"The optimizer state {name} is a {kind}, which a checkpoint cannot hold. Allowed: tensors, numbers, and "
            "the 8-bit and 4-bit state of torchao's optimizers."
        )
    if isinstance(value, DTensor) and value.shape[0] % _shards(value):
        raise ValueError(
            f"The optimizer state {name} of shape {list(value.shape)} is quantized and is not split evenly over "
            f"{_shards(value)} ranks, so a checkpoint cannot hold it. Use an optimizer in full precision, or a number "
            "of ranks that divides its rows."
        )
    signed = {"signed": bool(local.signed)} if hasattr(local, "signed") else {}
    return {"class": kind, "block_size": int(local.block_size), **signed}


def parts(name: str, value: Tensor) -> dict[str, Tensor]:
    """The tensors inside quantized state, named `name@part` and sharded like the state."""
    local = local_tensor(value)
    names, _ = local.__tensor_flatten__()  # type: ignore[attr-defined]
    inside = {part: getattr(local, part) for part in names if part not in _TABLES}
    if isinstance(value, DTensor):
        mesh, placements = value.device_mesh, value.placements
        inside = {part: DTensor.from_local(t, mesh, placements, run_check=False) for part, t in inside.items()}
    return {f"{name}@{part}": tensor for part, tensor in inside.items()}


def empty_states(folder: Path, parameters: Mapping[str, tuple[Any, Tensor]]) -> dict[str, Tensor]:
    """Create empty state for all quantized state in `folder`, sharded like the parameters.

    Args:
        folder: the optimizer folder of a checkpoint.
        parameters: maps parameter names to (optimizer, parameter).

    Returns:
        The state tensors by name.

    Raises:
        ValueError: torchao is not installed, a shard of a parameter ends inside a block, or the file is damaged.
    """
    if not (folder / SPECS).is_file():
        return {}
    specs = read_json(folder / SPECS)
    with damage_named(folder / SPECS):
        known = {name: dict(spec) for name, spec in specs.items() if name.rpartition("/")[0] in parameters}
        return {name: _empty(name, spec, parameters[name.rpartition("/")[0]][1]) for name, spec in known.items()}


def _empty(name: str, spec: Mapping[str, Any], parameter: Tensor) -> Tensor:
    local = local_tensor(parameter)
    shards = _shards(parameter) if isinstance(parameter, DTensor) else 1
    if local.numel() % spec["block_size"] or parameter.shape[0] % shards:
        raise ValueError(
            f"{name} was saved in blocks of {spec['block_size']} elements, and a shard of shape {list(local.shape)} "
            "ends inside a block. Resume on the number of ranks that wrote the checkpoint."
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
    if not path.startswith("torchao.optim."):  # a checkpoint must not name other code to import
        raise ValueError(f"{path} is not a tensor class of torchao's optimizers. Do not trust this checkpoint.")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"The checkpoint needs torchao's {name}, which cannot be imported: install the version that wrote it."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Tensor)):
        raise ValueError(f"{path} is not a tensor class of torchao's optimizers. Do not trust this checkpoint.")
    return found


def _shards(tensor: DTensor) -> int:
    """Number of shards along the first dimension. Raises a ValueError for any other placement."""
    odd = [p for p in tensor.placements if not isinstance(p, Replicate) and p != Shard(0)]
    if odd:
        raise ValueError(
            f"Quantized optimizer state with the placements {odd} cannot be saved, only Shard(0) and Replicate can: "
            "use an optimizer in full precision."
        )
    return math.prod(
        tensor.device_mesh.size(axis) for axis, placement in enumerate(tensor.placements) if placement == Shard(0)
    )
