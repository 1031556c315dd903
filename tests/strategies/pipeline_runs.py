"""Training through pipeline stages, and the same on one device by plain torch."""

from __future__ import annotations

from typing import Any

import torch

from automodel_trainer.models.lora import LoRAConfig, apply_lora, finish_lora
from tests.harness import Batch, NextToken, adamw, make_strategy, once, random_rows, reference_steps, train_steps
from tests.routers import routed_model

STEPS, ROWS, LENGTH, MAX_NORM, LR = 3, 8, 13, 0.5, 1e-2
MICRO_BATCHES = 4
LORA = {"rank": 4, "init": "orthogonal"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    """With an eps far above the rounding of a gradient: some biases have gradients that are zero but for that."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return adamw(trained, LR, eps=3e-2)


def rows_of(step: int) -> list[Batch]:
    return random_rows(ROWS, LENGTH, seed=step)


def build(family: str, lora: bool, **overrides: Any) -> Any:
    model = routed_model(family, **{"num_hidden_layers": 4, **overrides})
    if lora:
        apply_lora(model, LoRAConfig(**LORA))  # type: ignore[arg-type]
    return model


def train(
    spec: str,
    world_size: int,
    family: str,
    lora: bool = False,
    precision: str = "fp32",
    objective_class: type[NextToken] = NextToken,
    **overrides: Any,
) -> Any:
    """Three optimizer steps on this rank; its gradients and weights, gathered, come back."""
    torch.manual_seed(world_size)  # nothing may depend on it
    strategy = make_strategy(spec, world_size, precision)
    model = strategy.parallelize(build(family, lora, **overrides))
    finish_lora(model)
    optimizer = adam(model)
    size = ROWS // strategy.dp_size // MICRO_BATCHES
    return train_steps(strategy, objective_class(model), optimizer, rows_of, size, steps=STEPS, max_norm=MAX_NORM)


@once
def reference(family: str, lora: bool = False, **overrides: Any) -> Any:
    """The same by plain torch on one device, over all rows at once."""
    model = build(family, lora, **overrides)
    finish_lora(model)
    optimizer = adam(model)
    return reference_steps(model, optimizer, rows_of, steps=STEPS, max_norm=MAX_NORM)
