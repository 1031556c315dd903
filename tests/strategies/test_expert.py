"""Expert parallel against plain torch on one device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from automodel_trainer.models.kernels.experts import swap_experts
from automodel_trainer.models.lora import LoRAConfig, apply_lora, finish_lora
from automodel_trainer.strategies.expert.plan import require_experts
from tests.beside import use
from tests.harness import (
    Batch,
    NextToken,
    check_steps,
    make_strategy,
    random_rows,
    reference_steps,
    train_steps,
    with_limits,
)
from tests.matrix import more
from tests.pool import RankPool
from tests.routers import decided, separated
from tests.strategies.test_tensor import LATENT, MOE, adam
from tests.tiny import tiny_model

STEPS, ROWS, MAX_NORM, LENGTH = 3, 8, 0.5, 13
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": MOE,
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "glm4_moe": {k: v for k, v in LATENT.items() if "lora" not in k and not k.startswith(("qk_", "v_"))},
}


_ROUTER_BIAS = ("router.bias", "e_score_correction_bias")
SEEDS = {"mixtral": 7, "gpt_oss": 9}  # of routers without a near tie; others have that of `separated`


def rows_of(step: int) -> list[Batch]:
    """Plain rows in the first step, packed ones in the second, padded ones in the third."""
    rows = random_rows(ROWS, LENGTH, seed=step)
    for index, row in enumerate(rows if step else []):
        place = torch.arange(LENGTH)[None]
        start, end = (index % 4 + 3, LENGTH) if step == 1 else (0, LENGTH - index)
        row["position_ids"] = torch.where(place < start, place, place - start)
        row["labels"] = row["labels"].masked_fill((place == start) | (place >= end), -100)
        if step == 2:
            row["attention_mask"] = (place < end).long()
    return rows


def train(
    spec: str,
    world_size: int,
    family: str,
    lora: dict[str, Any] | None = None,
    skewed: bool = False,
    grouped: bool = False,
    **overrides: Any,
) -> Any:
    """Three optimizer steps of two micro-batches on this rank; full gradients and weights come back."""
    torch.manual_seed(world_size)
    strategy = make_strategy(spec, world_size)
    model = build(family, skewed, **overrides)
    if lora is not None:
        apply_lora(model, LoRAConfig(rank=4, **lora))
    if grouped and world_size > 1:
        assert swap_experts(model)[0]
    strategy.parallelize(model)
    if lora is not None:
        finish_lora(model)
    size = max(ROWS // strategy.dp_size // 2, 1)
    with decided(model) if world_size == 1 else nullcontext():
        return train_steps(strategy, NextToken(model), adam(model), rows_of, size, steps=STEPS, max_norm=MAX_NORM)


def build(family: str, skewed: bool, **overrides: Any) -> Any:
    model = separated(tiny_model(family, **{**FAMILIES[family], **overrides}), SEEDS.get(family, 4))
    return skew(model) if skewed else model


def skew(model: Any) -> Any:
    """Let every token choose the first two experts, so that the others and, with ep=2, a whole rank get no token.

    The router's scores are small beside these numbers, and no larger ones are needed: they would be rounded more.
    """
    bias = torch.tensor([5.5, 5.0, -5.0, -5.5])
    chosen = [t for name, t in (*model.named_parameters(), *model.named_buffers()) if name.endswith(_ROUTER_BIAS)]
    assert chosen
    for tensor in chosen:
        tensor.data.copy_(bias)
    return model


def reference(family: str, skewed: bool = False, **overrides: Any) -> Any:
    model = build(family, skewed, **overrides)
    return reference_steps(model, adam(model), rows_of, steps=STEPS, max_norm=MAX_NORM)


@pytest.mark.parametrize(
    ("spec", "world_size", "family"),
    [
        more("fsdp2:ep=2", 2, "qwen3_moe"),
        more("fsdp2:ep=2", 2, "gpt_oss"),
        more("fsdp2:ep=2", 2, "deepseek_v3"),
        ("fsdp2_ep", 4, "mixtral"),
        ("fsdp2:ep=2", 2, "olmoe"),
        more("fsdp2:ep=2", 4, "olmoe"),
        ("fsdp2:ep=2,tp=2", 4, "qwen2_moe"),
        ("fsdp2:ep=4,tp=2,sequence_parallel=false", 4, "glm4_moe"),
        ("fsdp2:ep=2,cp=2", 4, "deepseek_v2"),
        ("hsdp:dp_replicate=2,ep=2", 4, "gpt_oss"),
        ("3d:pp=2,ep=2", 4, "qwen3_moe"),
    ],
)
def test_parity(pool: RankPool, spec: str, world_size: int, family: str) -> None:
    expected = reference(family)
    check_steps(pool.run(world_size, train, spec, world_size, family), expected)


@pytest.mark.parametrize(
    ("spec", "world_size", "family", "options"),
    [
        more("fsdp2:ep=2", 2, "qwen3_moe", {"lora": {}}),
        more("fsdp2:ep=2", 4, "gpt_oss", {"lora": {"target_modules": ["q_proj", "gate_up_proj", "down_proj"]}}),
        ("fsdp2:ep=4,tp=2", 4, "glm4_moe", {"lora": {}}),
        ("3d:pp=2,ep=2", 4, "deepseek_v3", {"lora": {}}),
        ("3d:pp=2,schedule=zbv,ep=2", 4, "qwen3_moe", {"num_hidden_layers": 4}),
        ("fsdp2:ep=2,activation_checkpointing=full", 2, "deepseek_v3", {"skewed": True}),
        ("fsdp2:ep=2", 2, "gpt_oss", {"skewed": True, "lora": {"target_modules": ["gate_up_proj", "down_proj"]}}),
        ("fsdp2:ep=4,sync_every_micro_batch=true", 4, "gpt_oss", {"skewed": True, "experts_implementation": "eager"}),
        ("fsdp2:ep=2,sync_every_micro_batch=true", 4, "gpt_oss", {"skewed": True, "grouped": True}),
        ("fsdp2:ep=2,activation_checkpointing=full", 4, "qwen3_moe", {"lora": {}, "grouped": True}),
        ("fsdp2:tp=2", 4, "qwen3_moe", {"lora": {}, "grouped": True}),
        ("fsdp2:ep=2,compile=true,compile_backend=aot_eager", 2, "mixtral", {"grouped": True}),
        more("fsdp2:ep=2,compile=true,compile_backend=aot_eager", 2, "gpt_oss", {"grouped": True, "skewed": True}),
        more(
            "fsdp2:ep=2,activation_checkpointing=full,compile=true,compile_backend=aot_eager",
            2,
            "qwen3_moe",
            {"grouped": True, "lora": {}},
        ),
        more("fsdp2:ep=2,compile=true,compile_backend=aot_eager", 2, "mixtral", {}),
        more("fsdp2:compile=true,compile_backend=aot_eager", 2, "mixtral", {"grouped": True}),
        more("fsdp2:ep=2,compile=true,compile_backend=aot_eager", 2, "deepseek_v3", {}),
        ("fsdp2:ep=2,activation_checkpointing=selective", 2, "qwen3_moe", {"lora": {}}),
    ],
)
def test_as_on_one_device(pool: RankPool, spec: str, world_size: int, family: str, options: dict[str, Any]) -> None:
    """Adapters, and routers that leave experts and ranks without a token: held against the same run on one device."""
    expected = with_limits(lambda: train("auto", 1, family, **options))
    check_steps(pool.run(world_size, train, spec, world_size, family, **options), expected)


def sizes(spec: str, world_size: int, family: str, **overrides: Any) -> Any:
    """What `parallelize` says to these sizes."""
    strategy = make_strategy(spec, world_size)
    try:
        strategy.parallelize(tiny_model(family, **overrides))
    except ValueError as error:
        return str(error)
    return strategy.expert_ranks


@pytest.mark.parametrize(
    ("spec", "world_size", "family", "said"),
    [
        (
            "fsdp2:ep=4",
            2,
            "qwen3_moe",
            "must divide dp_shard × cp × tp = 2 (expert parallel borrows its ranks from them) and the 4 experts.",
        ),
        ("fsdp2:ep=3", 2, "qwen3_moe", "Allowed: ep in [1, 2]."),
        ("hsdp:ep=4", 4, "qwen3_moe", "ep=4 must divide dp_shard × cp × tp = 2"),
        ("fsdp2:ep=0", 2, "qwen3_moe", "ep=0 is not a size"),
        ("fsdp2:ep=two", 2, "qwen3_moe", "ep='two' is not a size"),
        ("fsdp2:ep=2", 2, "llama", "LlamaForCausalLM declares none. Set ep=1."),
        ("fsdp2_ep", 2, "llama", "LlamaForCausalLM declares none. Set ep=1."),
    ],
)
def test_sizes_that_do_not_fit(pool: RankPool, spec: str, world_size: int, family: str, said: str) -> None:
    for message in pool.run(world_size, sizes, spec, world_size, family, **FAMILIES.get(family, {})):
        assert said in message


def test_a_plan_rule_that_matches_nothing_is_refused() -> None:
    strategy = make_strategy("fsdp2", 1)
    strategy.ep = 2  # type: ignore[attr-defined]
    model = tiny_model("qwen3_moe", **MOE)
    model.ep_plan = {**model.ep_plan, "model.layers.*.mlp.experts.up_proj": "grouped_gemm"}
    with pytest.raises(
        ValueError, match=r"match nothing.*: model\.layers\.\*\.mlp\.experts\.up_proj\. .*hold.*gate_up_proj"
    ):
        strategy.parallelize(model)
    model.ep_plan = {**model.ep_plan, "model.layers.*.mlp.experts.down_proj": "colwise"}
    with pytest.raises(ValueError, match=r"unsupported styles: .*experts\.down_proj"):
        strategy.parallelize(model)


def test_rules_for_layers_beside_the_experts_do_not_count() -> None:
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    model = tiny_model("gemma4_text", hidden_size_per_layer_input=8, vocab_size_per_layer_input=264, **experts)
    assert "colwise" in model.ep_plan.values()
    assert [layer.stacked for layer in require_experts(model)] == [("gate_up_proj", "down_proj")] * 2


def test_auto_takes_what_node_and_experts_allow(pool: RankPool) -> None:
    for experts, expected in ((4, 4), (6, 2), (5, 1)):
        options = {**MOE, "num_experts": experts}
        assert pool.run(4, sizes, "fsdp2_ep", 4, "qwen3_moe", **options) == [expected] * 4


def test_experts_that_are_quantized_already_are_refused() -> None:
    use("torchao")
    model = build("qwen3_moe", False, hidden_size=64, moe_intermediate_size=64)
    apply_lora(model, LoRAConfig(rank=4, quantize="nf4", target_modules=["gate_up_proj", "down_proj"]))
    finish_lora(model)
    strategy = make_strategy("fsdp2", 1)
    strategy.ep = 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="are quantized already"):
        strategy.parallelize(model)
