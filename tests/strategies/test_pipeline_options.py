"""Pipeline stages that are compiled, checkpoint activations or compute in bf16, against plain torch on one device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_trainer.modules import linear_cross_entropy
from automodel_trainer.modules import loss as loss_module
from automodel_trainer.modules.loss import next_token_targets, summed_loss
from automodel_trainer.nn.deferred_logits import defer_logits
from automodel_trainer.strategies import Parallel3DStrategy
from tests.harness import NextToken, check_steps, make_strategy, random_rows, stack
from tests.limits import Limits
from tests.matrix import more
from tests.pool import RankPool
from tests.strategies import pipeline_runs
from tests.strategies.pipeline_runs import (
    LENGTH,
    MAX_NORM,
    MICRO_BATCHES,
    ROWS,
    STEPS,
    adam,
    build,
    reference,
    train,
)
from tests.strategies.test_compile import COMPILED, Counted
from tests.tiny import tiny_model

OTHERS = ("gradient norm", "gradients", "weights")
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("spec", "world_size", "family", "options"),
    [
        more("3d:pp=2", 2, "gemma3_text", TIED),
        ("3d:pp=2,schedule=interleaved_1f1b,activation_checkpointing=full", 2, "llama", {**TIED, "lora": True}),
        more("3d:pp=2,schedule=zbv", 2, "llama", TIED),
        ("3d:pp=2,schedule=zbv", 2, "gemma3_text", TIED),
        ("3d:pp=2,activation_checkpointing=selective", 2, "qwen3", UNTIED),
        more("3d:pp=2,activation_checkpointing=selective", 4, "qwen3", UNTIED),
        more("3d:pp=2,tp=2,activation_checkpointing=full", 4, "llama", UNTIED),
    ],
)
def test_compiled_stages(pool: RankPool, spec: str, world_size: int, family: str, options: dict[str, Any]) -> None:
    expected = reference(family, **options)
    check_steps(pool.run(world_size, train, f"{spec},{COMPILED}", world_size, family, **options), expected)


def bf16_reference(family: str, **overrides: Any) -> dict[str, Any]:
    """fp32 master weights; forward and backward of every micro-batch in bf16, its gradients added up in fp32."""
    master = build(family, lora=False, **overrides)
    optimizer = adam(master)
    history = []
    for step in range(STEPS):
        rows = random_rows(ROWS, LENGTH, seed=step)
        tokens = (stack(rows)["labels"][:, 1:] != -100).sum()
        computing = copy.deepcopy(master)
        for parameter in computing.parameters():
            parameter.data = parameter.data.bfloat16()
        total = 0.0
        size = ROWS // MICRO_BATCHES
        for batch in (stack(rows[i : i + size]) for i in range(0, ROWS, size)):
            logits = computing(input_ids=batch["input_ids"], use_cache=False).logits.float()
            targets = next_token_targets(batch["labels"]).flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
            computing.zero_grad()
            (loss / tokens).backward()
            total += loss.item() / tokens.item()
            for wide, narrow in zip(master.parameters(), computing.parameters()):
                assert narrow.grad is not None
                wide.grad = narrow.grad.float() + (0 if wide.grad is None else wide.grad)
        norm = torch.nn.utils.clip_grad_norm_(master.parameters(), MAX_NORM)
        gradients = {name: p.grad.clone() for name, p in master.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": total, "norm": norm.item(), "gradients": gradients})
    return {"history": history, "weights": {n: p.detach() for n, p in master.named_parameters()}}


@pytest.mark.parametrize(
    ("spec", "world_size", "options"),
    [
        ("3d:pp=2,schedule=interleaved_1f1b", 2, UNTIED),
        (f"3d:pp=2,{COMPILED}", 2, TIED),
        more(f"3d:pp=2,{COMPILED}", 4, TIED),
        ("3d:pp=2,schedule=zbv", 2, TIED),
    ],
)
def test_bf16(pool: RankPool, spec: str, world_size: int, options: dict[str, Any]) -> None:
    """Hidden states travel in bf16; master weights and sums of gradients are fp32.

    Two runs that round alike, in other orders, are no further from each other than both are from the exact one.
    """
    results = pool.run(world_size, train, spec, world_size, "llama", precision="bf16", **options)
    assert {w.dtype for result in results for w in result["weights"].values()} == {torch.float32}
    expected = bf16_reference("llama", **options)
    limits = Limits.of(expected, reference("llama", **options), safety=2)
    check_steps(results, {**expected, "limits": limits}, {"loss": 1e-3, **dict.fromkeys(OTHERS, 6e-2)})


def count_calls(spec: str) -> int:
    """How often one activation function of this rank's stage is computed in a step of four micro-batches."""
    torch._dynamo.reset()
    strategy = make_strategy(spec, 2)
    model = build("llama", lora=False, num_hidden_layers=4 if "zbv" in spec else 2).train()
    model = strategy.parallelize(model)
    assert isinstance(strategy, Parallel3DStrategy)
    assert strategy.pipeline is not None
    layer = model.model.layers[strategy.pipeline.model.split.own[-1].layers[0]]
    counted = layer.mlp.act_fn = Counted(layer.mlp.act_fn)
    micro_batches = [stack(random_rows(1, 8, seed=i)) for i in range(4)]
    strategy.forward_backward(NextToken(model), micro_batches, torch.tensor(10))
    return counted.calls


@pytest.mark.parametrize("spec", ["3d:pp=2", f"3d:pp=2,{COMPILED}", "3d:pp=2,schedule=zbv"])
def test_checkpointing_recomputes(pool: RankPool, spec: str) -> None:
    """What a block computes is computed once more in backward, and once only without checkpointing."""
    assert pool.run(2, count_calls, spec) == [4, 4]
    assert pool.run(2, count_calls, f"{spec},activation_checkpointing=full") == [8, 8]


class ChunkedLoss(NextToken):
    """As `CausalLMModule` has it: the head hands over hidden states, and the loss makes logits a chunk at a time."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        defer_logits(model)

    def loss(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        return summed_loss(outputs.logits, targets)


class MostLogits(TorchDispatchMode):
    """The most tokens whose logits a matmul has made at a time."""

    tokens = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and result.shape[-1] == 264:
            self.tokens = max(self.tokens, len(result))
        return result


def train_in_chunks(spec: str, **options: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch, MostLogits() as most:
        for module in (loss_module, linear_cross_entropy):
            patch.setattr(module, "chunk_rows", lambda *_: 5)
        patch.setattr(pipeline_runs, "routed_model", tiny_model)  # which runs the model to look for routers
        result = train(spec, 2, "llama", objective_class=ChunkedLoss, **options)
    return {**result, "most": most.tokens}


@pytest.mark.parametrize("spec", ["3d:pp=2", "3d:pp=2,schedule=zbv"])
def test_the_last_stage_never_has_all_logits(pool: RankPool, spec: str) -> None:
    results = pool.run(2, train_in_chunks, spec, **TIED)
    assert max(result["most"] for result in results) == 5
    check_steps(results, reference("llama", **TIED))
