"""Callbacks of Lightning that average or prune weights: refused where they would work on a part of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.distributed.tensor import DTensor

from automodel_trainer._lightning import average_one_by_one
from automodel_trainer.models.quantization.quantize import is_quantized
from automodel_trainer.models.stage_names import pipeline_of
from automodel_trainer.nn.uneven import is_uneven

AVERAGING = (StochasticWeightAveraging, WeightAveraging)


def check_objective(callbacks: Iterable[Any], model: nn.Module) -> None:
    """Refuse callbacks that cannot do with a laid-out model what they are for, and prepare those that can.

    Raises:
        ValueError: one averages or prunes weights, and these cannot be averaged, or pruned.
    """
    for callback in callbacks:
        name, why = type(callback).__name__, None
        if isinstance(callback, AVERAGING):
            why = _not_averaged(model)
        elif isinstance(callback, ModelPruning) and (_is_sharded(model) or pipeline_of(model) is not None):
            why = "It compares all weights, and here each rank holds a part of them: use strategy='ddp', or one device,"
        if why is not None:
            raise ValueError(f"{name} cannot work on this model. {why} or leave it out.")
        if isinstance(callback, WeightAveraging) and _is_sharded(model):
            average_one_by_one(callback)


def _not_averaged(model: nn.Module) -> str | None:
    if name := next((name for name, parameter in model.named_parameters() if is_quantized(parameter)), None):
        return f"{name} is held quantized, which has no average: hold weights dense (lora quantize, kernels fp8),"
    if pipeline_of(model) is not None:
        return "Here each rank holds other layers, and a checkpoint holds the averages of rank 0: set pp=1,"
    if any(is_uneven(parameter) for parameter in model.parameters()):
        return "This layout shards weights unevenly: use strategy='fsdp2',"
    return None


def check_users_module(module: pl.LightningModule) -> None:
    """Refuse callbacks that average weights which have been sharded since they copied them.

    Raises:
        ValueError: there is such a callback.
    """
    trainer: Any = module.trainer
    averaging = [callback for callback in trainer.callbacks if isinstance(callback, AVERAGING)]
    if averaging and _is_sharded(module):
        raise ValueError(
            f"{type(averaging[0]).__name__} copies a {type(module).__name__} before it is sharded, so it cannot "
            "average its shards. Use strategy='ddp', or one device. (Under fsdp2 and hsdp CausalLMModule and the "
            "other objectives are averaged.)"
        )


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())
