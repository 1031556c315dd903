"""The same numbers under every layout: loss, gradients, norm and weights against plain torch on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from automodel_trainer.strategies.clip import local_tensor
from tests.harness import NextToken, make_strategy, random_rows, reference_step, relative_error, stack
from tests.pool import RankPool
from tests.tiny import tiny_model

STEPS, ROWS, LENGTH, MAX_NORM, LR = 3, 8, 24, 0.5, 1e-2


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(spec: str, world_size: int, micro: int, family: str, tied: bool) -> Any:
    """Three optimizer steps on this rank; full gradients and weights come back."""
    torch.manual_seed(world_size)  # nothing may depend on it
    strategy = make_strategy(spec, world_size)
    model = strategy.parallelize(tiny_model(family, tie_word_embeddings=tied))
    objective = NextToken(model)
    if spec == "ddp" and world_size > 1:
        strategy._wrapped = strategy._wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    history = []
    for step in range(STEPS):
        rows = random_rows(ROWS, LENGTH, seed=step)
        mine = rows[strategy.dp_rank :: strategy.dp_size]
        micro_batches = [stack(mine[i : i + micro]) for i in range(0, len(mine), micro)]
        tokens = strategy.sum_over_tokens(
            torch.stack([(m["labels"][:, 1:] != -100).sum() for m in micro_batches]).sum()
        )
        loss = strategy.forward_backward(objective, micro_batches, tokens)
        norm = strategy.clip_grad_norm_(model.parameters(), MAX_NORM)
        gradients = {name: full(p.grad).clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        total = strategy.sum_over_tokens(loss.clone()) / tokens
        history.append({"loss": total.item(), "norm": norm.item(), "gradients": gradients})
    held = sum(local_tensor(p).numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    weights = {name: full(p).detach().clone() for name, p in model.named_parameters()}
    return {"history": history, "weights": weights, "held": held}


def reference(family: str, tied: bool) -> Any:
    model = tiny_model(family, tie_word_embeddings=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    history = [reference_step(model, random_rows(ROWS, LENGTH, seed=s), optimizer, MAX_NORM) for s in range(STEPS)]
    return {"history": history, "weights": {n: p.detach() for n, p in model.named_parameters()}}


def check(result: Any, expected: Any) -> None:
    for got, want in zip(result["history"], expected["history"]):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["norm"] == pytest.approx(want["norm"], rel=1e-4)
        assert got["gradients"].keys() == want["gradients"].keys()
        for name, gradient in want["gradients"].items():
            assert relative_error(got["gradients"][name], gradient) < 1e-4, name
    for name, weight in expected["weights"].items():
        assert relative_error(result["weights"][name], weight) < 1e-4, name


@pytest.mark.parametrize("spec", ["auto", "ddp", "fsdp2:cpu_offload=true", "fsdp2:activation_checkpointing=full"])
@pytest.mark.parametrize("micro", [8, 3, 1])
def test_one_device(spec: str, micro: int) -> None:
    """Accumulation over 1, 3 ragged and 8 micro-batches."""
    check(train(spec, 1, micro, "llama", tied=True), reference("llama", tied=True))


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
        ("hsdp:dp_replicate=4", 4, 2, "llama", False),
    ],
)
def test_ranks(pool: RankPool, spec: str, world_size: int, micro: int, family: str, tied: bool) -> None:
    expected = reference(family, tied)
    results = pool.run(world_size, train, spec, world_size, micro, family, tied)
    for result in results:
        check(result, expected)
    shards = {"ddp": 1, "hsdp": 2, "hsdp:dp_replicate=4": 1}.get(spec, world_size)
    assert results[0]["held"] == pytest.approx(1 / shards, rel=0.1)


def test_the_check_can_fail() -> None:
    """Gradients averaged where they must be summed are seen."""
    result = train("auto", 1, 4, "llama", tied=True)
    result["history"][1]["gradients"]["model.norm.weight"] /= 2
    with pytest.raises(AssertionError):
        check(result, reference("llama", tied=True))
