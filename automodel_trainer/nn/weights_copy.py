"""A copy of the weights of a model that is spread over devices, as callbacks keep one that average weights."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import nn

from automodel_trainer.nn._torch import is_persistent


class WeightsCopy(nn.Module):
    """The parameters and buffers of a module under the same names, sharded as they are. It computes nothing.

    Frozen parameters share their memory with the module's.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it does not become a part of the copy

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raise RuntimeError: hooks and connections of a sharded model cannot be copied."""
        raise RuntimeError(
            "This is a copy of the weights of a sharded model (copy.deepcopy), which cannot run. Run the model itself, "
            "or load a second one: AutoModelForCausalLM.from_pretrained(…, strategy=…)."
        )


def copy_weights_only(model: nn.Module) -> None:
    """Let `copy.deepcopy(model)` give a `WeightsCopy` from now on."""
    model.__deepcopy__ = partial(_copied, model)  # type: ignore[assignment]


def original_of(model: nn.Module) -> nn.Module:
    """The model that `model` holds a copy of the weights of; itself if it is no such copy."""
    return model._original[0] if isinstance(model, WeightsCopy) else model


def _copied(module: nn.Module, memo: dict[int, Any]) -> WeightsCopy:
    found = WeightsCopy(module)
    memo[id(module)] = found
    found.train(module.training)
    for name, parameter in module._parameters.items():
        found.register_parameter(name, None if parameter is None else _parameter(parameter, memo))
    for name, buffer in module._buffers.items():
        found.register_buffer(name, copy.deepcopy(buffer, memo), persistent=is_persistent(module, name))
    for name, child in module._modules.items():
        found.add_module(name, None if child is None else memo.get(id(child)) or _copied(child, memo))
    return found


def _parameter(parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    if not parameter.requires_grad:
        memo.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
    found: nn.Parameter = copy.deepcopy(parameter, memo)
    return found
