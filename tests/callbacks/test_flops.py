"""The formula of `flops_per_token` against torch's own count of what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from automodel_trainer.nn.flops import _matmul_weights, _text_config, flops_per_token, peak_flops, peak_flops_of
from tests.tiny import tiny_model

SIZES: dict[str, Any] = {"num_hidden_layers": 6, "attn_implementation": "eager"}
B, S = 2, 48


def counted(model: nn.Module) -> float:
    """FLOPs per token of forward and backward, as torch counts the operators that ran."""
    ids = torch.randint(1, 200, (B, S))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops() / (B * S)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_full_training_is_what_torch_counts(model_type: str, tied: bool) -> None:
    model = tiny_model(model_type, tie_word_embeddings=tied, **SIZES)
    assert flops_per_token(model, S, causal=False) == pytest.approx(counted(model), rel=0.02)


@pytest.mark.parametrize("first", ["layers.0.self_attn.q_proj", "layers.3.self_attn.q_proj", "lm_head"])
def test_frozen_weights_have_no_weight_gradient_and_no_backward_below_the_first_trained(first: str) -> None:
    model = tiny_model("llama", **SIZES)
    full = flops_per_token(model, S, causal=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(first in name)
    # k and v of that layer need no input gradient either, which the formula does not see
    assert flops_per_token(model, S, causal=False) == pytest.approx(counted(model), rel=0.04)
    assert flops_per_token(model, S, causal=False) < 0.75 * full


def test_lora_adapters_count_in_full_and_their_base_without_weight_gradient() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama", **SIZES),
        peft.LoraConfig(
            r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        ),
    )
    assert flops_per_token(model, S, causal=False) == pytest.approx(counted(model), rel=0.04)


def test_only_the_chosen_experts_count() -> None:
    sizes = {**SIZES, "moe_intermediate_size": 32, "num_experts": 8}
    two, four = (
        flops_per_token(tiny_model("qwen3_moe", num_experts_per_tok=k, **sizes), S, causal=False) for k in (2, 4)
    )
    expert = 3 * 32 * 32  # gate, up, down
    assert four - two == pytest.approx(6 * 6 * 2 * expert)
    dense = tiny_model("qwen3", **{**SIZES, "intermediate_size": 64})  # two experts of 32 are as wide as one of 64
    router = 6 * 6 * 8 * 32
    assert two == pytest.approx(flops_per_token(dense, S, causal=False) + router)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("aria_text", {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1}),
        ("gemma4_text", {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}),
        ("inkling_text", {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2}),
        ("longcat_flash", {"n_routed_experts": 6, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 64}),
    ],
)
def test_experts_count_whatever_their_number_is_called(family: str, sizes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = tiny_model(family, **sizes, num_layers=2) if family == "longcat_flash" else tiny_model(family, **sizes)
    found = {id(weight): share for weight, share in _matmul_weights(model, _text_config(model))}
    shares = {name: found[id(p)] for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3}
    # Two of eight choices, of which longcat_flash has two without an expert, and room for these in one of its stacks.
    expected = {"gate_up_proj": 0.25 * 0.75, "down_proj": 0.25} if family == "longcat_flash" else {}
    assert shares
    for name, share in shares.items():
        assert share == expected.get(name.rpartition(".")[2], 0.25)
    assert all(found[id(p)] == 1 for name, p in model.named_parameters() if "shared_experts" in name and p.ndim > 1)


def test_causal_attention_and_a_sliding_window_attend_to_fewer_keys() -> None:
    model = tiny_model("llama", **SIZES)
    attention = flops_per_token(model, 2 * S, causal=False) - flops_per_token(model, S, causal=False)
    per_key = attention / S
    assert flops_per_token(model, S, causal=False) - flops_per_token(model, S) == pytest.approx(per_key * (S - 1) / 2)
    windowed = tiny_model("mistral", sliding_window=8, **SIZES)
    keys = sum(min(i + 1, 8) for i in range(S)) / S
    assert flops_per_token(windowed, S) - flops_per_token(windowed, 0) == pytest.approx(
        per_key * (keys - 0.5), rel=1e-6
    )


def test_a_module_without_a_transformers_config_counts_its_weights() -> None:
    assert flops_per_token(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3)), S) == 6 * 12


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("AMD Instinct MI300X", 1307e12),
        ("Some GPU 3000", None),
    ],
)
def test_the_peak_is_found_by_the_devices_name(name: str, peak: float | None) -> None:
    assert peak_flops_of(name) == peak


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
