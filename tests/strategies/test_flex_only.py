"""Attention with sinks or soft caps through FlexAttention, under layouts that cut heads or rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations import flex_attention as flex_integration

from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.models.kernels import attention
from automodel_trainer.models.kernels.attention import install_attention_kernel
from tests.flex_written_out import written_out
from tests.harness import NextToken, check_steps, make_strategy, once, reference_steps, train_steps
from tests.pool import RankPool
from tests.routers import routed_model
from tests.strategies.test_tensor import MAX_NORM, ROWS, STEPS, adam, rows_of

SIZES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
    "gemma2": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "attn_logit_softcapping": 2.0},
}


def build(family: str) -> Any:
    model = routed_model(family, **SIZES[family])
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.uniform_(parameter, -1, 2, generator=torch.Generator().manual_seed(1))
    packing_without_sync(model)
    return model


def train(spec: str, world_size: int, family: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_HALF", (torch.float32,))
        patch.setattr(flex_integration, "compile_friendly_flex_attention", written_out)
        strategy = make_strategy(spec, world_size)
        model = build(family)
        install_attention_kernel(model)
        strategy.parallelize(model)
        size = ROWS // strategy.dp_size // 2
        return train_steps(strategy, NextToken(model), adam(model), rows_of, size, steps=STEPS, max_norm=MAX_NORM)


@once
def reference(family: str) -> Any:
    model = build(family)
    return reference_steps(model, adam(model), rows_of, steps=STEPS, max_norm=MAX_NORM)


@pytest.mark.parametrize(
    ("spec", "ranks", "family"),
    [("fsdp2:tp=2", 2, "gpt_oss"), ("fsdp2:cp=2,cp_attention=ulysses", 2, "gpt_oss"), ("fsdp2:tp=2", 2, "gemma2")],
)
def test_layouts(pool: RankPool, spec: str, ranks: int, family: str) -> None:
    expected = reference(family)
    for result in pool.run(ranks, train, spec, ranks, family):
        check_steps(result, expected)
