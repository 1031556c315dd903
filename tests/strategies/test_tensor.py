"""Tensor and sequence parallel against plain torch on one device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from automodel_trainer.models.lora import LoRAConfig, apply_lora, finish_lora
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
    with_limits,
)
from tests.matrix import more
from tests.pool import RankPool
from tests.routers import decided, routed_model

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
    """With an eps far above the rounding of a gradient: some biases have gradients that are zero but for that."""
    return adamw(model.parameters(), LR, eps=1e-2)


def rows_of(step: int) -> list[Batch]:
    """Plain rows in the first step, packed ones in the second, padded ones in the third."""
    rows = random_rows(ROWS, LENGTH, seed=step)
    for index, row in enumerate(rows if step else []):
        place = torch.arange(LENGTH)[None]
        start, end = (index + 3, LENGTH) if step == 1 else (0, LENGTH - 2 * index)
        row["position_ids"] = torch.where(place < start, place, place - start)
        row["labels"] = row["labels"].masked_fill((place == start) | (place >= end), -100)
        if step == 2:
            row["attention_mask"] = (place < end).long()
    return rows


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
    model = routed_model(family, **overrides)
    if lora is not None:
        apply_lora(model, LoRAConfig(rank=4, **lora))
    strategy.parallelize(model)
    if lora is not None:
        finish_lora(model)
    optimizer = adam(model)
    size = ROWS // strategy.dp_size // 2
    with decided(model) if world_size == 1 else nullcontext():
        return train_steps(strategy, WithBalance(model), optimizer, rows_of, size, steps=STEPS, max_norm=MAX_NORM)


@once
def reference(family: str, **overrides: Any) -> Any:
    model = routed_model(family, **overrides)
    optimizer = adam(model)
    return reference_steps(model, optimizer, rows_of, steps=STEPS, max_norm=MAX_NORM)


@pytest.mark.parametrize(
    ("spec", "world_size", "family", "overrides"),
    [
        more("fsdp2:tp=2", 2, "llama", {"tie_word_embeddings": True}),
        more("fsdp2:tp=2,sequence_parallel=false", 2, "llama", {"tie_word_embeddings": False}),
        ("fsdp2:tp=2", 2, "llama", {"attention_bias": True, "mlp_bias": True, "vocab_size": 265}),
        ("fsdp2:tp=2,sequence_parallel=false", 2, "llama", {"attention_bias": True, "mlp_bias": True}),
        ("fsdp2:tp=4", 4, "llama", {**WIDE, "vocab_size": 266, "tie_word_embeddings": True}),
        more("fsdp2:tp=2", 4, "llama", {"vocab_size": 265, "tie_word_embeddings": True}),
        ("fsdp2:tp=2,activation_checkpointing=full", 2, "qwen3", {"tie_word_embeddings": True}),
        more("fsdp2:tp=2,activation_checkpointing=full", 4, "qwen3", {"tie_word_embeddings": True}),
        ("fsdp2:tp=2,dp_replicate=2", 4, "qwen3", {}),
        ("fsdp2:tp=2", 2, "gemma3_text", {"tie_word_embeddings": True}),
        ("fsdp2:tp=2", 2, "phi3", {}),
        more("fsdp2:tp=4", 4, "gpt_neox", {"attention_bias": True}),
        ("fsdp2:tp=2", 2, "gpt_neox", {"tie_word_embeddings": True}),
        ("fsdp2:tp=2", 2, "starcoder2", {"residual_dropout": 0.0}),
        ("fsdp2:tp=2", 2, "apertus", {}),  # an activation function with parameters
        more("fsdp2:tp=2", 4, "qwen3_moe", MOE),
        ("fsdp2:tp=2,sequence_parallel=false", 2, "qwen3_moe", MOE),
        ("fsdp2:tp=2", 2, "qwen2_moe", {**MOE, "shared_expert_intermediate_size": 32}),
        ("fsdp2:tp=2", 2, "deepseek_v3", LATENT),
        more("fsdp2:tp=2", 4, "deepseek_v3", LATENT),
        more("fsdp2:tp=2", 2, "deepseek_v2", {**LATENT, "topk_method": "greedy"}),
    ],
)
def test_parity(pool: RankPool, spec: str, world_size: int, family: str, overrides: dict[str, Any]) -> None:
    expected = reference(family, **overrides)
    for result in pool.run(world_size, train, spec, world_size, family, **overrides):
        check_steps(result, expected)


@pytest.mark.parametrize(
    ("spec", "world_size", "family", "overrides"),
    [
        ("fsdp2:tp=2", 4, "llama", {"lora": {"init": "orthogonal"}, "attention_bias": True}),
        ("fsdp2:tp=2,sequence_parallel=false", 2, "qwen3", {"lora": {"init": "orthogonal"}}),
        ("fsdp2:tp=2", 2, "phi3", {"lora": {"init": "orthogonal", "modules_to_save": ["lm_head"]}}),
        ("fsdp2:tp=2", 2, "llama", {"lora": {"use_dora": True, "target_modules": ["q_proj", "up_proj"]}}),
        ("fsdp2:tp=2", 2, "qwen3_moe", {"lora": {}, **MOE}),
        more("fsdp2:tp=2", 4, "qwen3_moe", {"lora": {}, **MOE}),
        # Stacks [experts, in, out], of which the plan cuts both halves of the last side: PEFT's side of A.
        ("fsdp2:tp=2", 2, "llama4_text", {"lora": {}, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("fsdp2:tp=2", 2, "deepseek_v2", {"lora": {}, **LATENT, "topk_method": "greedy"}),
        ("fsdp2:tp=2", 2, "qwen3_moe", {"output_router_logits": True, **MOE}),
        ("fsdp2:tp=2,cp=2", 4, "qwen3", {"tie_word_embeddings": True}),
        ("fsdp2:tp=2,cp=2,cp_attention=ring", 4, "llama", {"lora": {"init": "orthogonal"}, "num_key_value_heads": 2}),
    ],
)
def test_as_on_one_device(pool: RankPool, spec: str, world_size: int, family: str, overrides: dict[str, Any]) -> None:
    """Adapters, balancing loss and context parallel: held against the same run on one device."""
    expected = with_limits(lambda: train("auto", 1, family, **overrides))
    for result in pool.run(world_size, train, spec, world_size, family, **overrides):
        check_steps(result, expected)
