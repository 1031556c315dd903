"""Callbacks of Lightning that average weights: what they copy of a module, and how that is loaded again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from automodel_trainer.checkpoint.edited_weights import like
from automodel_trainer.models.lora import lora_of
from automodel_trainer.models.lora.adapter_files import trained_tensors
from automodel_trainer.models.quantization.quantize import is_quantized
from automodel_trainer.models.stage_names import pipeline_of
from automodel_trainer.nn.uneven import is_uneven
from automodel_trainer.nn.weights_copy import original_of


def let_callbacks_copy(trainer: Any, module: pl.LightningModule, model: nn.Module) -> None:
    """Let callbacks that average weights copy a module whose model was built after their `setup`.

    Raises:
        ValueError: there is such a callback, and weights of this model cannot be averaged.
    """
    averaging = [c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging | WeightAveraging)]
    if not averaging:
        return
    if why := _not_averaged(model):
        raise ValueError(f"{type(averaging[0]).__name__} averages all weights of the model. {why} or leave it out.")
    for callback in averaging:
        if isinstance(callback, StochasticWeightAveraging):  # it has copied a module without a model
            callback.setup(trainer, module, "fit")


def _not_averaged(model: nn.Module) -> str | None:
    if name := next((name for name, parameter in model.named_parameters() if is_quantized(parameter)), None):
        return f"{name} is held quantized, which has no average: hold the weights dense (lora quantize, kernels fp8),"
    if pipeline_of(model) is not None:
        return "Here each rank holds other layers, and a checkpoint holds the averages of rank 0: set pp=1,"
    if any(is_uneven(parameter) for parameter in model.parameters()):
        return "This layout shards them unevenly: use strategy='fsdp2',"
    return None


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
    own = original.state_dict(keep_vars=True)
    trained = trained_tensors(original)
    ids = {id(value) for value in trained.values()}
    frozen = {name: target[name] for name, value in own.items() if id(value) not in ids and name in target}
    names = {id(value): name for name, value in own.items()}
    of_peft = {name: names[id(value)] for name, value in trained.items() if id(value) in names}
    return {**frozen, **{of_peft.get(name, name): value for name, value in given.items()}}
