"""What a late replica group is given of a model and its optimizers: this rank's shards.

Large tensors travel from device to device, out of the tensors that train and into those that will. The rest goes with a
message. Both groups walk through their tensors in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_SHARD = "shard"  # the key of a rank's part of a tensor that is sharded as its parameter is


@dataclass(frozen=True)
class Sent:
    """Stands in a message for a tensor that is sent apart.

    Attributes:
        shape, dtype: of this rank's part.
        sharded: it is a part of a tensor that is sharded as its parameter is.
    """

    shape: torch.Size
    dtype: torch.dtype
    sharded: bool


class Shards:
    """This rank's trained parameters, buffers and optimizer states. Frozen weights come from the model's folder.

    Args:
        model: the laid-out model.
        optimizers: of it.
        device: where tensors lie that are sent apart.

    Attributes:
        message: what to pickle; it holds copies.
        apart: the tensors that are sent apart, in their order. They are not copied: send them before they change.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer], device: torch.device) -> None:
        self._device = device
        self.apart: list[Tensor] = []
        self.message: dict[str, Any] = {
            "parameters": [self._value(parameter) for parameter in trained(model)],
            "buffers": [self._value(buffer) for buffer in model.buffers()],
            "optimizers": [self._optimizer(optimizer.state_dict()) for optimizer in optimizers],
        }

    def _optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        return {
            "state": {
                number: {name: self._value(value, shard=isinstance(value, DTensor)) for name, value in values.items()}
                for number, values in state["state"].items()
            },
            "param_groups": [
                {name: _copied(value) for name, value in group.items()} for group in state["param_groups"]
            ],
        }

    def _value(self, value: Any, shard: bool = False) -> Any:
        part = local(value.detach()) if isinstance(value, Tensor) else None
        if part is not None and part.ndim and part.device.type == self._device.type and type(part) is Tensor:
            self.apart.append(part)
            return Sent(part.shape, part.dtype, shard)
        return {_SHARD: _copied(value)} if shard else _copied(value)


@torch.no_grad()
def take_over(
    message: Mapping[str, Any],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    receive: Callable[[Tensor], None],
) -> None:
    """Replace what `Shards` names by that of another group.

    Args:
        message: of the other group.
        receive: fills a contiguous tensor with the next one that the other group sends.

    Raises:
        ValueError: the other group has another model.
    """
    for mine, theirs in ((trained(model), message["parameters"]), (list(model.buffers()), message["buffers"])):
        if len(mine) != len(theirs):
            raise _other_model(f"{len(theirs)} tensors", f"{len(mine)} tensors")
        for tensor, value in zip(mine, theirs):
            _fill(local(tensor.detach()), value, receive)
            torch.autograd.graph.increment_version(tensor)  # what is derived from it is stale
    for optimizer, given in zip(optimizers, message["optimizers"], strict=True):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = {}
        for number, values in given["state"].items():
            own = optimizer.state.get(parameters[number], {})
            states[number] = {
                name: _received(value, own.get(name), parameters[number], receive) for name, value in values.items()
            }
        optimizer.load_state_dict({**given, "state": states})


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor. It shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, in the same order on every rank."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _copied(value: Any) -> Any:
    return local(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _fill(tensor: Tensor, value: Any, receive: Callable[[Tensor], None]) -> None:
    """Write into a tensor what another group has in its place."""
    if not isinstance(value, Sent):
        tensor.copy_(value)
        return
    if (tensor.shape, tensor.dtype) != (value.shape, value.dtype):
        raise _other_model(f"{value.dtype} {[*value.shape]}", f"{tensor.dtype} {[*tensor.shape]}")
    if tensor.is_contiguous():
        receive(tensor)
    else:
        whole = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        receive(whole)
        tensor.copy_(whole)


def _received(value: Any, own: Any, parameter: Tensor, receive: Callable[[Tensor], None]) -> Any:
    """A value of an optimizer's state for a parameter, in the memory of this group's `own` value if that fits."""
    if isinstance(value, Sent):
        fits = isinstance(own, Tensor) and isinstance(own, DTensor) == value.sharded
        if fits and (local(own).shape, local(own).dtype) == (value.shape, value.dtype):
            _fill(local(own), value, receive)
            return own
        part = torch.empty(value.shape, dtype=value.dtype, device=local(parameter).device)
        receive(part)
        return _sharded(part, parameter) if value.sharded else part
    if isinstance(value, dict) and value.keys() == {_SHARD}:
        return _sharded(value[_SHARD].to(local(parameter).device, copy=True), parameter)
    # An optimizer may keep what it is given, and this memory is that of a message.
    return value.clone() if isinstance(value, Tensor) else value


def _sharded(part: Tensor, parameter: Tensor) -> DTensor:
    assert isinstance(parameter, DTensor), "both groups lay the parameter out alike"
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _other_model(theirs: str, mine: str) -> ValueError:
    return ValueError(
        f"Another replica group has {theirs} where this one has {mine}. All groups must be started with the same "
        "configuration and the same number of ranks."
    )
