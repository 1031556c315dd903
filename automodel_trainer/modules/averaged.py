"""Loads a state into a module, or into a copy of one in which a callback averages weights (torch's `AveragedModel`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from automodel_trainer.checkpoint.edited_weights import like, trained_state
from automodel_trainer.models.lora import lora_of
from automodel_trainer.models.lora.adapter_files import trained_tensors
from automodel_trainer.nn.weights_copy import original_of


def into_model(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before torch loads a part of `state` into `module`: give Hugging Face keys the names that torch looks for.

    Args:
        module: with a `model`, inside of another module.
        state: of that other module. It is changed.
        prefix: of the keys that belong to `module`.
    """
    if module.model is None:
        return
    names = [name for name in state if name.startswith(prefix)]
    given = placed(module.model, {name.removeprefix(prefix): state.pop(name) for name in names})
    state |= {f"{prefix}model.{name}": value for name, value in given.items()}


def placed(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """What `state` holds for `model`, sharded as its own tensors are.

    Adapters may have PEFT's names. Beside them, frozen weights may be missing, and keep their values.
    """
    target = model.state_dict()
    return {name: like(value, target.get(name)) for name, value in _completed(model, state, target).items()}


def _completed(model: nn.Module, given: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    original = original_of(model)
    if lora_of(original) is None:
        return dict(given)
    trained = trained_state(original)
    frozen = {name: value for name, value in target.items() if name not in trained}
    names = {id(value): name for name, value in trained.items()}
    of_peft = {name: names[id(value)] for name, value in trained_tensors(original).items() if id(value) in names}
    return {**frozen, **{of_peft.get(name, name): value for name, value in given.items()}}
