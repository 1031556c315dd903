"""Pipeline parallel, alone and with the other axes, against plain torch on one device.

What the tests choose from {layouts} × {schedules} × {ties, LoRA} × {families} is a covering part;
docs/pipeline_matrix.py runs all of it.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from automodel_trainer.strategies.data_parallel import shard
from tests.harness import NextToken, check_steps, full, make_strategy, random_rows, relative_error, stack
from tests.matrix import more
from tests.pool import RankPool
from tests.strategies.pipeline_runs import MOE, build, reference, train


def uneven() -> list[dict[str, Any]]:
    """Micro-batches of different rows and lengths: plain, padded, packed from two documents, and plain again."""
    made = [stack(random_rows(rows, length, seed=length)) for rows, length in ((2, 13), (2, 9), (1, 12), (1, 7))]
    made[1]["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
    made[1]["attention_mask"][0, 6:] = 0
    made[1]["labels"][0, 6:] = -100
    made[2]["position_ids"] = torch.cat([torch.arange(5), torch.arange(7)])[None]
    made[2]["labels"][:, [0, 5]] = -100
    return made


def one_step(spec: str, world_size: int, family: str) -> dict[str, Any]:
    strategy = make_strategy(spec, world_size)
    model = strategy.parallelize(build(family, lora=False))
    micro_batches = uneven()
    tokens = torch.stack([(m["labels"][:, 1:] != -100).sum() for m in micro_batches]).sum()
    loss = strategy.sum_over_tokens(strategy.forward_backward(NextToken(model), micro_batches, tokens)) / tokens
    return {"loss": loss.item(), "gradients": {n: full(p.grad).clone() for n, p in model.named_parameters()}}


@pytest.mark.parametrize(
    ("spec", "world_size", "family"),
    [("3d:pp=2,schedule=zbv", 2, "gemma3_text"), ("3d:pp=2,cp=2,activation_checkpointing=full", 4, "llama")],
)
def test_uneven_micro_batches(pool: RankPool, spec: str, world_size: int, family: str) -> None:
    """Padding to one shape changes nothing; document boundaries and windows hold on every stage."""
    model = build(family, lora=False)
    losses = []
    for micro_batch in uneven():
        inputs, targets = NextToken(model).split(micro_batch)
        losses.append(F.cross_entropy(model(**inputs).logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    tokens = sum(int((m["labels"][:, 1:] != -100).sum()) for m in uneven())
    expected = torch.stack(losses).sum() / tokens
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    results = pool.run(world_size, one_step, spec, world_size, family)
    assert {name for result in results for name in result["gradients"]} == gradients.keys()
    for result in results:
        assert result["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert not {n for n, g in result["gradients"].items() if relative_error(g, gradients[n]) > 1e-4}


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("spec", "world_size", "family", "options"),
    [
        ("3d:pp=2", 2, "llama", UNTIED),
        more("3d:pp=2", 2, "llama", TIED),
        ("3d:pp=2,schedule=gpipe", 2, "qwen3", {**TIED, "num_hidden_layers": 3}),
        ("3d:pp=2,schedule=interleaved_1f1b", 2, "gemma3_text", TIED),
        ("3d:pp=2,schedule=interleaved_zero_bubble", 2, "llama", UNTIED),
        more("3d:pp=2,schedule=zbv", 2, "qwen3", TIED),
        ("3d:pp=2,schedule=dualpipev", 2, "gpt_neox", {}),
        ("3d:pp=2,schedule=looped_bfs", 2, "phi3", {}),
        ("3d:pp=2", 2, "gpt2", {**TIED, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
        ("3d:pp=2", 2, "qwen3_moe", MOE),
        ("3d:pp=2", 2, "mamba", {"state_size": 8}),  # asks the head for its dtype
        ("3d:pp=2,schedule=zbv", 2, "llama", {**UNTIED, "lora": True}),
        more("3d:pp=2", 2, "qwen3", {**TIED, "lora": True}),
        ("3d:pp=4", 4, "gemma3_text", TIED),
        ("pp_tp_dp:pp=2", 4, "llama", TIED),
        ("3d:pp=2,sync_every_micro_batch=true", 4, "llama", TIED),
        ("3d:pp=2,schedule=interleaved_1f1b,sync_every_micro_batch=true", 4, "qwen3", UNTIED),
        ("3d:pp=2,dp_replicate=2,schedule=zbv", 4, "qwen3", TIED),
        ("3d:pp=2,schedule=interleaved_1f1b,reshard_after_forward=true", 4, "gemma3_text", TIED),
        more("3d:pp=2,tp=2", 4, "llama", TIED),
        ("3d:pp=2,tp=2,schedule=interleaved_1f1b,sequence_parallel=false", 4, "phi3", {}),
        more("3d:pp=2,tp=2,schedule=zbv", 4, "qwen3", UNTIED),
        ("3d:pp=2,tp=2,schedule=zbv", 4, "llama", TIED),
        more("3d:pp=2,cp=2", 4, "llama", UNTIED),
        ("3d:pp=2,cp=2,schedule=zbv,cp_attention=ring", 4, "qwen3", TIED),
        ("3d:pp=2,activation_checkpointing=full,schedule=zbv", 4, "llama", TIED),
        ("3d:pp=2,activation_checkpointing=selective", 2, "qwen3", TIED),
        more("3d:pp=2,activation_checkpointing=selective,cp=2", 4, "qwen3", TIED),
    ],
)
def test_parity(pool: RankPool, spec: str, world_size: int, family: str, options: dict[str, Any]) -> None:
    expected = reference(family, **options)
    check_steps(pool.run(world_size, train, spec, world_size, family, **options), expected)


def let_go(spec: str, world_size: int) -> bool:
    """Whether the model of a strategy is gone with it after a step."""
    strategy = make_strategy(spec, world_size)
    model = strategy.parallelize(build("llama", lora=False))
    micro_batches = [stack(random_rows(2, 13, seed=seed)) for seed in range(4)]
    strategy.forward_backward(NextToken(model), micro_batches, torch.tensor(1))
    alive = weakref.ref(model)
    del strategy, model
    gc.collect()
    return alive() is None


@pytest.mark.parametrize("spec", ["3d:pp=2", "3d:pp=2,schedule=zbv", "3d:pp=2,cp=2,activation_checkpointing=full"])
def test_the_model_is_let_go_with_the_strategy(pool: RankPool, spec: str) -> None:
    """A loss that is kept with its graph would keep the model for good: no garbage collector looks through a graph."""
    assert pool.run(4, let_go, spec, 4) == [True] * 4


def said_of_gradients(spec: str, world_size: int) -> list[str]:
    """What is said when a model is laid out on devices with hardly any memory."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "memory_of", lambda device: SimpleNamespace(total=1))
        patch.setattr(shard, "rank_zero_info", said.append)
        make_strategy(spec, world_size).parallelize(build("llama", lora=False))
    return [line.partition(":")[0] for line in said]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("3d:pp=2", "sync_every_micro_batch='auto'"),
        ("3d:pp=2,schedule=zbv", "schedule='zbv' keeps whole gradients until the end of a step"),
    ],
)
def test_what_gradients_take_is_said_once(pool: RankPool, spec: str, expected: str) -> None:
    assert pool.run(4, said_of_gradients, spec, 4) == [[expected]] * 4
