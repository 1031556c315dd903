"""Tensor and sequence parallel against plain torch on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from automodel_trainer.models.lora import LoRAConfig, apply_lora, finish_lora
from tests.harness import NextToken, make_strategy, random_rows, reference_step, relative_error, stack
from tests.pool import RankPool
from tests.tiny import tiny_model

STEPS, ROWS, MAX_NORM, LR = 3, 4, 0.5, 1e-2
LENGTH = 13  # divides by no number of ranks
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 4,
}  # fmt: skip


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    """With an eps above the rounding of a gradient: some biases have gradients that are zero but for that."""
    return torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-5)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class WithBalance(NextToken):
    """Adds the router's balancing loss where the model computes one."""

    def loss(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        balance = getattr(outputs, "aux_loss", None)
        loss = super().loss(outputs, targets)
        return loss if balance is None else loss + 0.1 * balance * (targets != -100).sum()


def train(spec: str, world_size: int, family: str, lora: dict[str, Any] | None = None, **overrides: Any) -> Any:
    """Three optimizer steps of two micro-batches on this rank; full gradients and weights come back."""
    torch.manual_seed(world_size)
    strategy = make_strategy(spec, world_size)
    model = tiny_model(family, **overrides)
    if lora is not None:
        apply_lora(model, LoRAConfig(rank=4, **lora))
    strategy.parallelize(model)
    if lora is not None:
        finish_lora(model)
    optimizer = adam(model)
    history = []
    for step in range(STEPS):
        mine = random_rows(ROWS, LENGTH, seed=step)[strategy.dp_rank :: strategy.dp_size]
        half = len(mine) // 2
        micro_batches = [stack(mine[:half]), stack(mine[half:])]
        tokens = strategy.sum_over_rows(torch.stack([(m["labels"][:, 1:] != -100).sum() for m in micro_batches]).sum())
        loss = strategy.forward_backward(WithBalance(model), micro_batches, tokens)
        norm = strategy.clip_grad_norm_(model.parameters(), MAX_NORM)
        gradients = {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        total = strategy.sum_over_tokens(loss.clone()) / tokens
        history.append({"loss": total.item(), "norm": norm.item(), "gradients": gradients})
    weights = {name: full(p).detach().clone() for name, p in model.named_parameters()}
    return {"history": history, "weights": weights}


def reference(family: str, **overrides: Any) -> Any:
    model = tiny_model(family, **overrides)
    optimizer = adam(model)
    history = [reference_step(model, random_rows(ROWS, LENGTH, seed=s), optimizer, MAX_NORM) for s in range(STEPS)]
    return {"history": history, "weights": {n: p.detach() for n, p in model.named_parameters()}}


def check(result: Any, expected: Any) -> None:
    for got, want in zip(result["history"], expected["history"]):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["norm"] == pytest.approx(want["norm"], rel=1e-4)
        assert got["gradients"].keys() == want["gradients"].keys()
        wrong = {n: relative_error(got["gradients"][n], g) for n, g in want["gradients"].items()}
        assert not {name: error for name, error in wrong.items() if error > 1e-4}
    for name, weight in expected["weights"].items():
        assert relative_error(result["weights"][name], weight) < 1e-4, name


@pytest.mark.parametrize(
    ("spec", "world_size", "family", "overrides"),
    [
        ("fsdp2:tp=2", 2, "llama", {"tie_word_embeddings": True}),
        ("fsdp2:tp=2,sequence_parallel=false", 2, "llama", {"tie_word_embeddings": False}),
        ("fsdp2:tp=2", 2, "llama", {"attention_bias": True, "mlp_bias": True, "vocab_size": 265}),
        ("fsdp2:tp=2,sequence_parallel=false", 2, "llama", {"attention_bias": True, "mlp_bias": True}),
        ("fsdp2:tp=4", 4, "llama", {**WIDE, "vocab_size": 266, "tie_word_embeddings": True}),
        ("fsdp2:tp=2", 4, "llama", {"vocab_size": 265, "tie_word_embeddings": True}),
        ("fsdp2:tp=2,activation_checkpointing=full", 4, "qwen3", {"tie_word_embeddings": True}),
        ("fsdp2:tp=2,dp_replicate=2", 4, "qwen3", {}),
        ("fsdp2:tp=2", 2, "gemma3_text", {"tie_word_embeddings": True}),
        ("fsdp2:tp=2", 2, "phi3", {}),
        ("fsdp2:tp=4", 4, "gpt_neox", {"attention_bias": True}),
        ("fsdp2:tp=2", 2, "gpt_neox", {"tie_word_embeddings": True}),
        ("fsdp2:tp=2", 2, "starcoder2", {"residual_dropout": 0.0}),
        ("fsdp2:tp=2", 2, "apertus", {}),  # an activation function with parameters
        ("fsdp2:tp=2", 4, "qwen3_moe", MOE),
        ("fsdp2:tp=2,sequence_parallel=false", 2, "qwen3_moe", MOE),
        ("fsdp2:tp=2", 2, "qwen2_moe", {**MOE, "shared_expert_intermediate_size": 32}),
        ("fsdp2:tp=2", 4, "deepseek_v3", LATENT),
        ("fsdp2:tp=2", 2, "deepseek_v2", {**LATENT, "topk_method": "greedy"}),
    ],
)
def test_parity(pool: RankPool, spec: str, world_size: int, family: str, overrides: dict[str, Any]) -> None:
    expected = reference(family, **overrides)
    for result in pool.run(world_size, train, spec, world_size, family, **overrides):
        check(result, expected)


@pytest.mark.parametrize(
    ("spec", "world_size", "family", "overrides"),
    [
        ("fsdp2:tp=2", 4, "llama", {"lora": {"init": "orthogonal"}, "attention_bias": True}),
        ("fsdp2:tp=2,sequence_parallel=false", 2, "qwen3", {"lora": {"init": "orthogonal"}}),
        ("fsdp2:tp=2", 2, "phi3", {"lora": {"init": "orthogonal", "modules_to_save": ["lm_head"]}}),
        ("fsdp2:tp=2", 2, "llama", {"lora": {"use_dora": True, "target_modules": ["q_proj", "up_proj"]}}),
        ("fsdp2:tp=2", 4, "qwen3_moe", {"lora": {}, **MOE}),
        ("fsdp2:tp=2", 2, "deepseek_v2", {"lora": {}, **LATENT, "topk_method": "greedy"}),
        ("fsdp2:tp=2", 2, "qwen3_moe", {"output_router_logits": True, **MOE}),
        ("fsdp2:tp=2,cp=2", 4, "qwen3", {"tie_word_embeddings": True}),
        ("fsdp2:tp=2,cp=2,cp_attention=ring", 4, "llama", {"num_key_value_heads": 2}),
    ],
)
def test_as_on_one_device(pool: RankPool, spec: str, world_size: int, family: str, overrides: dict[str, Any]) -> None:
    """Adapters, balancing loss and context parallel: held against the same run on one device."""
    expected = train("auto", 1, family, **overrides)
    for result in pool.run(world_size, train, spec, world_size, family, **overrides):
        check(result, expected)
