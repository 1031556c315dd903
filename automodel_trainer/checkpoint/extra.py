"""Tensors in Lightning's state (averaged weights, buffers of callbacks): taken out of it and written as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from automodel_trainer.distributed.agreement import rank

INLINE = 1024  # elements; smaller tensors are written as JSON, where a person can read them
FOLDER = "extra"  # in a checkpoint


@dataclass(frozen=True)
class Stored:
    """Stands in the state for a tensor that is in a file.

    Attributes:
        name: the tensor's name in the files.
    """

    name: str


def take_out(state: Any, place: str = "", found: dict[str, Tensor] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Replace the large tensors in nested state by `Stored`.

    Args:
        state: dicts, lists and tuples; anything else is a leaf.
        place: where `state` is in the whole, for the names of tensors.
        found: the tensors found so far.

    Returns:
        The state without them, and the tensors by name. Rank 0 has those that are whole; all ranks have DTensors.
    """
    found = {} if found is None else found
    if isinstance(state, Tensor):
        if not isinstance(state, DTensor) and (state.numel() <= INLINE or type(state).__name__ not in _PLAIN):
            return state, found
        if isinstance(state, DTensor) or rank() == 0:
            found[place] = state.detach()
        return Stored(place), found
    if isinstance(state, Mapping):
        kept = {key: take_out(value, f"{place}.{key}" if place else str(key), found)[0] for key, value in state.items()}
        return kept, found
    if type(state) in (list, tuple):
        items = [take_out(value, f"{place}[{i}]", found)[0] for i, value in enumerate(state)]
        return (items if type(state) is list else tuple(items)), found
    return state, found


_PLAIN = ("Tensor", "Parameter")  # of subclasses (quantized weights) the codec says that it cannot hold them


def put_back(state: Any, folder: Path) -> Any:
    """The inverse of `take_out`: read the tensors, whole, from the files in `folder`.

    Raises:
        ValueError: a file is damaged, or a tensor is missing.
    """
    if not folder.is_dir():
        return state
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    return filled(state, tensors, folder)


def filled(state: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    """Nested state with the tensors in place of every `Stored`.

    Raises:
        ValueError: a tensor is missing; the message names `folder`.
    """
    if isinstance(state, Stored):
        if state.name not in tensors:
            raise ValueError(f"{folder} is damaged: it lacks {state.name}.")
        return tensors[state.name]
    if isinstance(state, dict):
        return {key: filled(value, tensors, folder) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(filled(value, tensors, folder) for value in state)
    return state
