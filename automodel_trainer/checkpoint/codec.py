"""Convert Python state to JSON and back without loss, so that no pickle is needed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from automodel_trainer.checkpoint.extra import Stored

_LARGEST_TENSOR = 1_000_000  # elements; larger tensors belong in safetensors files
_PLAIN = (str, int, bool, type(None))


def encode(value: Any, key: str = "") -> Any:
    """Convert nested state to values that `json.dumps` accepts.

    Beyond JSON it supports tuples, sets, dicts with keys that are not strings, tensors of any dtype with at most a
    million elements, numpy scalars, paths, dtypes, devices, NaN and infinity.

    Args:
        value: the state.
        key: its place in the whole state, for the error message.

    Raises:
        ValueError: a value is of any other type. The message names its key.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"__float__": repr(float(value))}
    if isinstance(value, (Mapping, argparse.Namespace)):
        return _encode_dict(vars(value) if isinstance(value, argparse.Namespace) else value, key)
    if type(value) is list:
        return [encode(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if type(value) in (tuple, set):
        items = value if type(value) is tuple else sorted(value, key=repr)  # the order of a set varies by process
        return {f"__{type(value).__name__}__": [encode(item, f"{key}[{i}]") for i, item in enumerate(items)]}
    return _encode_object(value, key)


def decode(value: Any, place: Any = "the state") -> Any:
    """The inverse of `encode`.

    Args:
        value: parsed JSON.
        place: where it comes from, for the error message.

    Raises:
        ValueError: `encode` cannot have written the value.
    """
    try:
        return _decode(value)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{place} is damaged: {type(error).__name__}: {error}") from error


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value)) if value else ""  # `encode` writes the tag first
    if tag in _DECODERS:
        return _DECODERS[tag](value)
    return {name: _decode(item) for name, item in value.items()}


def _encode_dict(value: Mapping[Any, Any], key: str) -> dict[str, Any]:
    # A dict with one of our tags as a key would be decoded as something else: store it as pairs.
    ours = any(isinstance(name, str) and name in _DECODERS for name in value)
    if ours or any(type(name) is not str for name in value):
        pairs = [[encode(name, key), encode(item, f"{key}[{name!r}]")] for name, item in value.items()]
        return {"__dict__": pairs}
    return {name: encode(item, f"{key}.{name}" if key else name) for name, item in value.items()}


def _encode_object(value: Any, key: str) -> Any:
    if isinstance(value, Tensor) and type(value) in (Tensor, torch.nn.Parameter) and value.numel() <= _LARGEST_TENSOR:
        dtype = str(value.dtype).removeprefix("torch.")
        numbers = value.detach().cpu().tolist()
        if value.is_floating_point() or value.is_complex():  # others are plain: a generator's state is thousands
            numbers = encode(numbers, key)
        return {"__tensor__": numbers, "dtype": dtype, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return encode(value.item(), key)
    if isinstance(value, Stored):
        return {"__stored__": value.name}
    if isinstance(value, Path):
        return {"__path__": str(value)}
    if isinstance(value, torch.dtype):
        return {"__dtype__": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"__device__": str(value)}
    if isinstance(value, (str, int)):  # enums of strings or integers, and other subclasses
        return str.__str__(value) if isinstance(value, str) else int(value)
    raise ValueError(
        f"{key or 'the state'} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot "
        "hold: checkpoints are JSON and safetensors, never pickle. Use only numbers, strings, lists, dicts and small "
        "tensors in state dicts and hyperparameters (self.save_hyperparameters(ignore=[...]) leaves out others)."
    )


def _decode_tensor(value: dict[str, Any]) -> Tensor:
    values = _decode(value["__tensor__"])
    return torch.tensor(values, dtype=_dtype(value["dtype"])).reshape(value["shape"])


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):  # a checkpoint must not name any other attribute of torch
        raise TypeError(f"{name!r} is not a dtype")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


_DECODERS: dict[str, Any] = {
    "__float__": lambda value: float(_text(value["__float__"])),
    "__tuple__": lambda value: tuple(_decode(value["__tuple__"])),
    "__set__": lambda value: set(_decode(value["__set__"])),
    "__dict__": lambda value: {_decode(name): _decode(item) for name, item in value["__dict__"]},
    "__tensor__": _decode_tensor,
    "__stored__": lambda value: Stored(_text(value["__stored__"])),
    "__path__": lambda value: Path(value["__path__"]),
    "__dtype__": lambda value: _dtype(value["__dtype__"]),
    "__device__": lambda value: torch.device(_text(value["__device__"])),
}
