"""Find trained parameters that no forward reaches, and freeze them before the optimizers are made.

A vision tower often has some: its last layers, where the model takes the features of an earlier one. They would never
change, DDP would wait for their gradients, and weight decay would shrink them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from automodel_trainer.models.record import record_of
from automodel_trainer.models.stage_names import pipeline_of
from automodel_trainer.strategies.base.objective import MicroBatch, Objective


@dataclass(frozen=True)
class IdleParameters:
    """An entry of a model's record: parameters that were frozen because no forward reaches them.

    Attributes:
        names: of them.
    """

    names: tuple[str, ...]


def freeze_idle(objective: Objective, strategy: Any, micro_batch: MicroBatch, among: Callable[[str], bool]) -> None:
    """Freeze the trained parameters that one forward and backward leave without a gradient. Collective.

    The model is as it was otherwise: no gradient stays, and no random number is drawn.

    Args:
        objective: its model is laid out, and not wrapped.
        strategy: runs the forward.
        micro_batch: the same on every rank, on any device, with everything that a forward can see.
        among: whether a parameter of this name may be frozen.
    """
    model, device = objective.model, strategy.root_device
    micro_batch = {k: v.to(device) if hasattr(v, "to") else v for k, v in micro_batch.items()}
    training = model.training
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.compiler.set_stance("force_eager"):
        if pipeline_of(model) is not None:
            one = torch.ones((), device=device)
            strategy.forward_backward(objective, [micro_batch] * strategy.min_micro_batches, one)
        else:
            inputs, targets = objective.split(micro_batch)
            objective.loss(strategy.forward(model, inputs), targets).backward()
    model.train(training)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    idle = [name for name, parameter in trained.items() if parameter.grad is None and among(name)]
    for parameter in trained.values():
        parameter.grad = None
    for name in idle:
        trained[name].requires_grad_(False)
    if idle:
        record_of(model).keep(IdleParameters(tuple(idle)))
