"""LoRA: what is adapted, what is trained, first values, learning rates, and clear errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from automodel_trainer import AutoModelForCausalLM
from automodel_trainer.models.lora import (
    LoRAConfig,
    adapter_names,
    adapters,
    apply_lora,
    describe_lora,
    finish_lora,
    starts_without_gradient,
    trained_names,
)
from automodel_trainer.models.lora.initialize import principal_factors
from automodel_trainer.modules.optim import OptimizerConfig, build_optimizer
from tests.harness import close
from tests.tiny import tiny_config, tiny_model

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}


def adapted(family: str = "llama", config: dict[str, Any] | None = None, **lora: Any) -> PreTrainedModel:
    model = tiny_model(family, **(config or {}))
    apply_lora(model, LoRAConfig(**{"rank": 4, **lora}))
    finish_lora(model)
    return model


def targets(model: PreTrainedModel) -> set[str]:
    return {re.sub(r"layers\.\d+\.", "", adapter.target.removeprefix("model.")) for adapter in adapters(model)}


ALL = {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({}, ALL),
        ({"exclude": ["mlp.*"]}, {n for n in ALL if n.startswith("self")}),
        ({"target_modules": ["q_proj", "v_proj"]}, {"self_attn.q_proj", "self_attn.v_proj"}),
        ({"target_modules": ["layers.*.mlp.*"]}, {n for n in ALL if n.startswith("mlp")}),
        ({"target_modules": r".*\.(q|k)_proj"}, {"self_attn.q_proj", "self_attn.k_proj"}),
        ({"target_modules": "q_proj"}, {"self_attn.q_proj"}),
        ({"target_modules": ["q_proj", "lm_head"]}, {"self_attn.q_proj", "lm_head"}),
    ],
)
def test_targets(lora: dict[str, Any], expected: set[str]) -> None:
    assert targets(adapted(**lora)) == expected


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("longcat_flash", {"n_routed_experts": 6, "zero_expert_num": 2, "moe_topk": 2, "num_layers": 1}),
        ("inkling_text", {"n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2}),
    ],
)
def test_all_stacks_of_experts_are_targets_whatever_their_number_is_called(family: str, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = tiny_model(family, **config)
    stacks = {name for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name}
    apply_lora(model, LoRAConfig(rank=4))
    assert stacks
    assert stacks <= {adapter.target for adapter in adapters(model)}


def test_all_linear_means_fused_experts_but_not_head_and_router() -> None:
    model = adapted("qwen3_moe", MOE)
    attention = {f"self_attn.{n}_proj" for n in "qkvo"}
    assert targets(model) == attention | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert "2 × gate_up_proj" in str(describe_lora(model))
    assert targets(adapted("qwen3_moe", MOE, target_modules=["gate.weight"])) == {"mlp.gate.weight"}


def test_names_of_the_base_stay_and_only_adapters_train() -> None:
    plain, model = tiny_model(), adapted(modules_to_save=["lm_head"])
    assert set(model.state_dict()) - adapter_names(model) == set(plain.state_dict())
    assert trained_names(model) == adapter_names(model) | {"lm_head.weight"}
    assert trained_names(plain) is None
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_adapters_begin_as_nothing_and_do_not_depend_on_the_global_seed() -> None:
    ids = torch.arange(6, 30)[None]
    torch.manual_seed(1)
    model = adapted()
    torch.manual_seed(2)
    other = adapted()
    assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
    first = next(iter(adapters(model))).a.weight
    assert torch.equal(first, next(iter(adapters(other))).a.weight)
    assert first.abs().max() <= first.shape[1] ** -0.5
    assert first.std() > 0.3 * first.shape[1] ** -0.5
    again = next(iter(adapters(adapted(seed=1)))).a.weight
    assert not torch.equal(first, again)
    factors = [adapter.a.weight for adapter in adapters(model) if adapter.a.weight.shape == first.shape]
    assert not torch.equal(factors[0], factors[1])


def test_pissa_takes_the_principal_part_out_of_the_base() -> None:
    plain, model = tiny_model(), adapted(init="pissa")
    for adapter in adapters(model):
        weight = plain.get_submodule(adapter.target).weight
        update = adapter.scaling * adapter.b.weight @ adapter.a.weight
        left, values, right = torch.linalg.svd(weight)
        best = left[:, :4] * values[:4] @ right[:4]
        close(update, best)
        close(adapter.module.weight + update, weight)
    with pytest.raises(ValueError, match="more than a weight of shape"):
        principal_factors(torch.ones(3, 8), 4, 1.0)


def test_orthogonal_factors_are_random_and_multiply_to_nothing() -> None:
    for adapter in adapters(adapted(init="orthogonal")):
        assert adapter.a.weight.std() > 0.03
        assert adapter.b.weight.std() > 0.03
        assert (adapter.b.weight @ adapter.a.weight).abs().max() < 1e-6


def test_dora_begins_with_the_norms_of_the_base() -> None:
    model = adapted(use_dora=True)
    for adapter in adapters(model):
        assert adapter.magnitude is not None
        close(adapter.magnitude, adapter.module.weight.norm(dim=1))  # type: ignore[operator]


def test_the_base_is_held_in_the_compute_dtype_and_ties_stay() -> None:
    model = tiny_model(tie_word_embeddings=True)
    apply_lora(model, LoRAConfig(rank=4, modules_to_save=["norm"]), torch.bfloat16, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert trained_names(model) == adapter_names(model) | {"model.norm.weight"}


def test_learning_rates_of_lora_plus_and_modules_to_save() -> None:
    model = adapted(modules_to_save=["embed_tokens"], lr_ratio=16, modules_to_save_lr=1e-5)
    optimizer = build_optimizer(OptimizerConfig(), model, lr=1e-4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert rates[id(parameter)] == pytest.approx(1e-4)
        elif "lora_B" in name:
            assert rates[id(parameter)] == pytest.approx(16e-4)
        elif "embed" in name:
            assert rates[id(parameter)] == pytest.approx(1e-5)
        else:
            assert id(parameter) not in rates


def test_dropout_is_on_the_input_of_adapters_in_training_only() -> None:
    model = adapted(dropout=0.5)
    ids = torch.arange(6, 30)[None]
    for adapter in adapters(model):
        torch.nn.init.ones_(adapter.b.weight)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_gradient_of_a_is_known_to_begin_at_zero() -> None:
    model = adapted()
    model(torch.arange(6, 30)[None]).logits.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad == 0).all() == starts_without_gradient(model, name), name


def test_from_config_gives_the_base_the_weights_it_has_without_adapters() -> None:
    plain = AutoModelForCausalLM.from_config(tiny_config(), seed=3)
    model = AutoModelForCausalLM.from_config(tiny_config(), seed=3, lora=LoRAConfig(rank=2))
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert all((adapter.b.weight == 0).all() for adapter in adapters(model))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "rank=0 adapts nothing"),
        ({"alpha": 0.0}, "alpha=0.0 would switch"),
        ({"dropout": 1.0}, "not a probability"),
        ({"init": "gaussian"}, "Allowed: kaiming, pissa, orthogonal"),
        ({"init": "orthogonal", "rank": 3}, "must be even"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["q_porj"]}, r"'q_porj' matches nothing. Would match: model.layers.\*.self_attn.q_proj"),
        ({"target_modules": ["q_proj", "kproj"]}, "'kproj' matches nothing"),
        ({"target_modules": ["q_proj", "layers.0.*.v_proj"]}, r"v_proj in some layers but misses model.layers.1"),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
        ({"exclude": ["lm_head"]}, "excludes nothing that is targeted"),
        ({"target_modules": ["q_proj"], "exclude": ["q_proj"]}, "leaves nothing"),
        ({"modules_to_save": ["head"]}, "'head' matches nothing. There are: .*lm_head"),
        ({"modules_to_save_lr": 1e-5}, "modules_to_save names nothing"),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, "lm_head is trained whole by"),
        ({"quantize": "int2"}, "Allowed: nf4"),
        ({"quantize": "nf4", "init": "pissa"}, "cannot be quantized"),
    ],
)
def test_bad_input(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(**lora)


@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"use_dora": True}, {"init": "pissa"}])
def test_what_fused_experts_cannot_have(lora: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"for linear layers only.*experts.*exclude: \['down_proj', 'gate_up_proj'\]"):
        adapted("qwen3_moe", MOE, **lora)
    assert targets(adapted("qwen3_moe", MOE, exclude=["experts.*"], **lora)) == {f"self_attn.{n}_proj" for n in "qkvo"}


def test_a_tied_head_cannot_be_adapted() -> None:
    with pytest.raises(ValueError, match="tied to another module"):
        adapted(config={"tie_word_embeddings": True}, target_modules=["q_proj", "lm_head"])


def test_some_layers_alone_are_meant_by_one_expression() -> None:
    model = adapted(target_modules=r"model\.layers\.0\..*v_proj")
    assert [adapter.target for adapter in adapters(model)] == ["model.layers.0.self_attn.v_proj"]


def test_loading_a_base_asks_for_no_adapter_weights(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, lora=LoRAConfig(rank=2))
    assert all((adapter.b.weight == 0).all() and adapter.a.weight.std() > 0 for adapter in adapters(model))
    assert not any("lora" in str(warning.message) for warning in recwarn)
