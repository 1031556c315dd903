"""The same numbers under every layout: loss, gradients, norm and weights against plain torch on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from automodel_trainer.distributed._dtensor import local_tensor
from tests.harness import (
    Batch,
    NextToken,
    adamw,
    check_steps,
    make_strategy,
    once,
    random_rows,
    reference_steps,
    train_steps,
)
from tests.pool import RankPool
from tests.tiny import tiny_model

STEPS, ROWS, LENGTH, MAX_NORM, LR = 2, 8, 24, 0.5, 1e-2
EPS = 1e-2  # far above the rounding of a gradient: with less, Adam makes whole steps of it


def rows_of(step: int) -> list[Batch]:
    return random_rows(ROWS, LENGTH, seed=step)


def train(spec: str, world_size: int, micro: int, family: str, tied: bool) -> Any:
    """Two optimizer steps on this rank; full gradients and weights come back."""
    torch.manual_seed(world_size)  # nothing may depend on it
    strategy = make_strategy(spec, world_size)
    model = strategy.parallelize(tiny_model(family, tie_word_embeddings=tied))
    objective = NextToken(model)
    if spec == "ddp" and world_size > 1:
        strategy._wrapped = strategy._wrap(model)
    optimizer = adamw(model.parameters(), LR, EPS)
    result = train_steps(strategy, objective, optimizer, rows_of, micro, steps=STEPS, max_norm=MAX_NORM)
    held = sum(local_tensor(p).numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    return {**result, "held": held}


@once
def reference(family: str, tied: bool) -> Any:
    model = tiny_model(family, tie_word_embeddings=tied)
    optimizer = adamw(model.parameters(), LR, EPS)
    return reference_steps(model, optimizer, rows_of, steps=STEPS, max_norm=MAX_NORM)


@pytest.mark.parametrize("spec", ["auto", "ddp", "fsdp2:cpu_offload=true", "fsdp2:activation_checkpointing=full"])
@pytest.mark.parametrize("micro", [8, 3, 1])
def test_one_device(spec: str, micro: int) -> None:
    """Accumulation over 1, 3 ragged and 8 micro-batches."""
    check_steps(train(spec, 1, micro, "llama", tied=True), reference("llama", tied=True))


@pytest.mark.parametrize(
    ("spec", "world_size", "micro", "family", "tied"),
    [
        ("ddp", 2, 2, "llama", False),
        ("ddp", 4, 1, "llama", True),
        ("fsdp2", 2, 4, "llama", True),
        ("fsdp2", 2, 1, "qwen3", False),
        ("fsdp2", 4, 2, "gemma3_text", True),
        ("fsdp2:reshard_after_forward=false,forward_prefetch=1,backward_prefetch=1", 4, 1, "llama", False),
        ("fsdp2:activation_checkpointing=selective", 2, 2, "llama", True),
        ("fsdp2:cpu_offload=true", 2, 2, "llama", True),
        ("fsdp2:sync_every_micro_batch=true", 2, 2, "llama", False),
        ("hsdp", 4, 1, "llama", True),
        ("hsdp:sync_every_micro_batch=true", 4, 1, "qwen3", False),
        ("hsdp:dp_replicate=4", 4, 2, "llama", False),
    ],
)
def test_ranks(pool: RankPool, spec: str, world_size: int, micro: int, family: str, tied: bool) -> None:
    expected = reference(family, tied)
    results = pool.run(world_size, train, spec, world_size, micro, family, tied)
    for result in results:
        check_steps(result, expected)
    shards = {"ddp": 1, "hsdp:dp_replicate=4": 1}.get(spec, 2 if "hsdp" in spec else world_size)
    assert results[0]["held"] == pytest.approx(1 / shards, rel=0.1)


def test_the_check_can_fail() -> None:
    """Gradients averaged where they must be summed are seen."""
    result = train("auto", 1, 4, "llama", tied=True)
    result["history"][1]["gradients"]["model.norm.weight"] /= 2
    with pytest.raises(AssertionError):
        check_steps(result, reference("llama", tied=True))
