"""Read a `.ckpt` file, which Lightning's own Trainer writes. It is a pickle from elsewhere: nothing in it is run."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.serialization import get_unsafe_globals_in_checkpoint

from automodel_trainer.checkpoint.manifest import MANIFEST
from automodel_trainer.checkpoint.saved_weights import like
from automodel_trainer.nn.text import listed


def read_lightning_file(file: Path) -> dict[str, Any]:
    """The content of a `.ckpt`: tensors, numbers, strings, lists and dicts. Tensors are on the CPU.

    Raises:
        ValueError: the file holds other objects (the message names them), or is no such file.
    """
    if (file.parent / MANIFEST).is_file():
        raise ValueError(f"{file} is a part of a checkpoint. Give its folder: {file.parent}.")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(file)) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{file} is neither a checkpoint folder nor a whole Lightning checkpoint: {error!r}"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(
            f"{file} has no state_dict, so it is not a Lightning checkpoint. Allowed: a checkpoint folder of this "
            "library, or a .ckpt file of Lightning's Trainer."
        )
    return content


def _refusal(file: Path) -> str:
    try:
        names = get_unsafe_globals_in_checkpoint(file)
    except Exception:  # any file of any age: the names are a help only
        names = []
    held = f"it holds {listed(names)}" if names else "it holds more than tensors, numbers and text"
    return (
        f"{file} is a Lightning checkpoint that is not read: {held}. Reading those would run code "
        "that the file names. To take its weights, load it where it was made, and save only its state_dict with "
        "torch.save({'state_dict': ckpt['state_dict']}, FILE). `amt convert FILE` then makes a folder of it."
    )


@torch.no_grad()
def load_optimizer_states(optimizers: Sequence[Optimizer], states: Sequence[dict[str, Any]]) -> None:
    """Load what torch's `Optimizer.state_dict` gave into optimizers whose parameters may be sharded. Collective.

    Raises:
        ValueError: the run has other optimizers or parameter groups.
    """
    if len(optimizers) != len(states):
        raise ValueError(
            f"The checkpoint holds the state of {len(states)} optimizer(s), but the run has {len(optimizers)}. Resume "
            "with the optimizers that were saved."
        )
    for optimizer, state in zip(optimizers, states):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        placed = {
            number: {key: _placed(value, parameters[number]) for key, value in entry.items()}
            for number, entry in state["state"].items()
            if isinstance(number, int) and number < len(parameters)
        }
        try:
            optimizer.load_state_dict({**state, "state": placed})
        except ValueError as error:
            raise ValueError(f"The checkpoint's {type(optimizer).__name__} is not that of the run: {error}") from error


def _placed(value: Any, parameter: Tensor) -> Any:
    return like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
