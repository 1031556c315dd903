"""Training through pipeline stages, and the same on one device by plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from automodel_trainer.models.lora import LoRAConfig, apply_lora, finish_lora
from tests.harness import NextToken, make_strategy, random_rows, reference_step, relative_error, stack
from tests.tiny import tiny_model

STEPS, ROWS, LENGTH, MAX_NORM, LR = 3, 8, 13, 0.5, 1e-2
MICRO_BATCHES = 4
LORA = {"rank": 4, "init": "orthogonal"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    """With an eps above the rounding of a gradient: some biases have gradients that are zero but for that."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, eps=1e-5)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def build(family: str, lora: bool, **overrides: Any) -> Any:
    model = tiny_model(family, **{"num_hidden_layers": 4, **overrides})
    if lora:
        apply_lora(model, LoRAConfig(**LORA))  # type: ignore[arg-type]
    return model


def train(
    spec: str, world_size: int, family: str, lora: bool = False, precision: str = "fp32", **overrides: Any
) -> Any:
    """Three optimizer steps on this rank; its gradients and weights, gathered, come back."""
    torch.manual_seed(world_size)  # nothing may depend on it
    strategy = make_strategy(spec, world_size, precision)
    model = strategy.parallelize(build(family, lora, **overrides))
    finish_lora(model)
    optimizer = adam(model)
    objective = NextToken(model)
    history = []
    for step in range(STEPS):
        mine = random_rows(ROWS, LENGTH, seed=step)[strategy.dp_rank :: strategy.dp_size]
        size = len(mine) // MICRO_BATCHES
        micro_batches = [stack(mine[i : i + size]) for i in range(0, len(mine), size)]
        tokens = strategy.sum_over_rows(torch.stack([(m["labels"][:, 1:] != -100).sum() for m in micro_batches]).sum())
        loss = strategy.forward_backward(objective, micro_batches, tokens)
        norm = strategy.clip_grad_norm_(model.parameters(), MAX_NORM)
        gradients = {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        total = strategy.sum_over_tokens(loss.clone()) / tokens
        history.append({"loss": total.item(), "norm": norm.item(), "gradients": gradients})
    weights = {name: full(p).detach().clone() for name, p in model.named_parameters()}
    return {"history": history, "weights": weights}


def reference(family: str, lora: bool = False, **overrides: Any) -> Any:
    """The same by plain torch on one device, over all rows at once."""
    model = build(family, lora, **overrides)
    finish_lora(model)
    optimizer = adam(model)
    history = [reference_step(model, random_rows(ROWS, LENGTH, seed=s), optimizer, MAX_NORM) for s in range(STEPS)]
    return {"history": history, "weights": {n: p.detach() for n, p in model.named_parameters()}}


def check(results: list[Any], expected: Any, loss: float = 1e-5, others: float = 1e-4) -> None:
    """Loss and norm are known on every rank, and the ranks' gradients and weights together are all there are.

    Args:
        loss: the largest relative error of a loss.
        others: that of norms, gradients and weights.
    """
    for step, want in enumerate(expected["history"]):
        seen = set()
        for got in (result["history"][step] for result in results):
            assert got["loss"] == pytest.approx(want["loss"], rel=loss)
            assert got["norm"] == pytest.approx(want["norm"], rel=others)
            wrong = {n: relative_error(g, want["gradients"][n]) for n, g in got["gradients"].items()}
            assert not {name: error for name, error in wrong.items() if error > others}
            seen |= got["gradients"].keys()
        assert seen == want["gradients"].keys()
    seen = set()
    for result in results:
        for name, weight in result["weights"].items():
            assert relative_error(weight, expected["weights"][name]) < others, name
        seen |= result["weights"].keys()
    assert seen == expected["weights"].keys()
