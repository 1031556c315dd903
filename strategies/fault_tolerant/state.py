"""What a late replica group is given of a model and its optimizers: this rank's shards, as plain tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_SHARD = "shard"  # the key of a rank's part of a tensor that is sharded as its parameter is


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor. It shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, in the same order on every rank."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def shards_of(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Any]:
    """Trained parameters, buffers and optimizer states, in host memory: training may go on while they are read.

    Frozen weights come from the model's folder in every group.
    """
    kept = [optimizer.state_dict() for optimizer in optimizers]
    return {
        "parameters": [_copied(parameter) for parameter in trained(model)],
        "buffers": [_copied(buffer) for buffer in model.buffers()],
        "optimizers": [
            {
                "state": _taken_apart(state["state"]),
                "param_groups": [
                    {name: _copied(value) for name, value in group.items()} for group in state["param_groups"]
                ],
            }
            for state in kept
        ],
    }


@torch.no_grad()
def take_over(state: dict[str, Any], model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Replace what `shards_of` names by that of another group."""
    for mine, theirs in (
        ([local(parameter) for parameter in trained(model)], state["parameters"]),
        (list(model.buffers()), state["buffers"]),
    ):
        for tensor, value in zip(mine, theirs, strict=True):
            tensor.copy_(value)
    for optimizer, given in zip(optimizers, state["optimizers"], strict=True):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = {number: _put_together(values, parameters[number]) for number, values in given["state"].items()}
        optimizer.load_state_dict({**given, "state": states})


def _taken_apart(states: dict[int, Any]) -> dict[int, Any]:
    return {
        number: {
            name: {_SHARD: _copied(value)} if isinstance(value, DTensor) else _copied(value)
            for name, value in values.items()
        }
        for number, values in states.items()
    }


def _copied(value: Any) -> Any:
    return local(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _put_together(values: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    return {name: _like(value, parameter) for name, value in values.items()}


def _like(value: Any, parameter: Tensor) -> Any:
    if not (isinstance(value, dict) and value.keys() == {_SHARD}):
        # An optimizer may keep what it is given, and this memory is that of a message.
        return value.clone() if isinstance(value, Tensor) else value
    assert isinstance(parameter, DTensor), "both groups lay the parameter out alike"
    return DTensor.from_local(
        value[_SHARD].to(parameter.to_local().device, copy=True),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
