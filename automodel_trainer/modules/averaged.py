"""Callbacks of Lightning that average or prune weights: what they cannot do, and how averages are loaded again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.distributed.tensor import DTensor

from automodel_trainer.checkpoint.edited_weights import like
from automodel_trainer.models.lora import lora_of
from automodel_trainer.models.lora.adapter_files import trained_tensors
from automodel_trainer.models.quantization.quantize import is_quantized
from automodel_trainer.models.stage_names import pipeline_of
from automodel_trainer.nn.uneven import is_uneven
from automodel_trainer.nn.weights_copy import original_of


def check_callbacks(callbacks: Iterable[Any], model: nn.Module) -> None:
    """Refuse callbacks that cannot do with a laid-out model what they are for.

    Raises:
        ValueError: one averages or prunes weights, and these cannot be averaged, or pruned.
    """
    for callback in callbacks:
        name, why = type(callback).__name__, None
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            why = _not_averaged(model)
        elif isinstance(callback, ModelPruning) and _is_spread(model):
            why = "It compares all weights, and here each rank holds a part of them: use strategy='ddp', or one device,"
        if why is not None:
            raise ValueError(f"{name} cannot work on this model. {why} or leave it out.")


def _not_averaged(model: nn.Module) -> str | None:
    if name := next((name for name, parameter in model.named_parameters() if is_quantized(parameter)), None):
        return f"{name} is held quantized, which has no average: hold weights dense (lora quantize, kernels fp8),"
    if pipeline_of(model) is not None:
        return "Here each rank holds other layers, and a checkpoint holds the averages of rank 0: set pp=1,"
    if any(is_uneven(parameter) for parameter in model.parameters()):
        return "This layout shards weights unevenly: use strategy='fsdp2',"
    return None


def _is_spread(model: nn.Module) -> bool:
    """Whether a rank holds a part of the weights, or FSDP2 exchanges them in forwards."""
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return sharded or pipeline_of(model) is not None


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
