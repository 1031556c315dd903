"""LoRA against PEFT: the same file format both ways, the same logits, losses and gradients."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from automodel_trainer import AutoModelForCausalLM
from automodel_trainer.models.lora import LoRAConfig, adapters
from automodel_trainer.models.lora.adapter_files import load_adapter, save_adapter, trained_tensors
from automodel_trainer.models.lora.initialize import initialize_adapter
from tests.harness import NextToken, close, make_strategy, random_rows, reference_step, stack
from tests.limits import SAFETY, SMALL, check_losses, check_within, roundoff
from tests.routers import separated
from tests.tiny import tiny_model

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
IDS = torch.arange(6, 70).view(2, 32)


def base(folder: Path, family: str = "llama", **config: Any) -> Path:
    separated(tiny_model(family, **config), seed=8).save_pretrained(folder)
    return folder


def peft_model(folder: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)


def disturb(model: PreTrainedModel) -> None:
    """Adapters that do something, and modules_to_save that differ from the base."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


CASES = {
    "plain": ("llama", {}, {}),
    "alpha": ("llama", {}, {"alpha": 3.0, "target_modules": ["q_proj", "down_proj"]}),
    "biases": ("qwen2", {}, {}),
    "dora": ("qwen2", {}, {"use_dora": True}),
    "rslora": ("llama", {}, {"use_rslora": True}),
    "pissa": ("llama", {}, {"init": "pissa"}),
    "orthogonal": ("llama", {}, {"init": "orthogonal"}),
    "head": ("llama", {}, {"modules_to_save": ["lm_head", "norm"]}),
    "tied": ("llama", {"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]}),
    "some layers": ("llama", {}, {"target_modules": r".*layers\.1\..*_proj"}),
    "experts": ("qwen3_moe", MOE, {}),
    "router": ("qwen3_moe", MOE, {"target_modules": ["q_proj", "gate.weight", "experts.down_proj"]}),
    "dense and experts": ("qwen3_moe", {**MOE, "mlp_only_layers": [0]}, {}),
    "shared experts": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 16}, {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}, {}),
    "transposed experts": ("gpt_oss", {"num_local_experts": 4}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours_and_we_read_it_back(case: str, tmp_path: Path) -> None:
    family, config, lora = CASES[case]
    folder = base(tmp_path / "base", family, **config)
    model = AutoModelForCausalLM.from_pretrained(folder, lora=LoRAConfig(rank=4, **lora)).eval()
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    expected = model(IDS).logits
    assert (expected - AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits).abs().max() > 1e-2
    close(peft_model(folder, tmp_path / "adapter").eval()(IDS).logits, expected)
    again = AutoModelForCausalLM.from_pretrained(folder, lora=LoRAConfig(adapter=str(tmp_path / "adapter"))).eval()
    assert torch.equal(again(IDS).logits, expected)
    save_adapter(again, tmp_path / "copy")
    ours, copied = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "copy"))
    assert ours.keys() == copied.keys()
    assert all(torch.equal(ours[name], copied[name]) for name in ours)


THEIRS = {
    "plain": ("llama", {}, {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 5}),
    "dora": ("llama", {}, {"target_modules": "all-linear", "use_dora": True}),
    "patterns": (
        "llama",
        {},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"down_proj": 7}},
    ),
    "rslora patterns": (
        "llama",
        {},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 9}, "use_rslora": True},
    ),
    "saved": ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "experts and router": ("qwen3_moe", MOE, {"target_modules": "all-linear"}),
    "one expert weight": (
        "mixtral",
        {"num_local_experts": 4},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    ),
}


@pytest.mark.parametrize("case", THEIRS)
def test_we_read_peft(case: str, tmp_path: Path) -> None:
    family, config, lora = THEIRS[case]
    folder = base(tmp_path / "base", family, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(r=4, init_lora_weights=False, **lora)
        ).eval()
        theirs.save_pretrained(tmp_path / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(folder, lora=LoRAConfig(adapter=str(tmp_path / "adapter"))).eval()
    close(ours(IDS).logits, theirs(IDS).logits)
    save_adapter(ours, tmp_path / "copy")
    back = peft_model(folder, tmp_path / "copy").eval()
    close(back(IDS).logits, ours(IDS).logits)


@pytest.mark.parametrize(
    ("family", "config", "lora"),
    [
        ("llama", {}, {}),
        ("qwen2", {}, {"use_dora": True}),
        ("llama", {}, {"use_rslora": True, "init": "pissa"}),
        ("llama", {}, {"modules_to_save": ["lm_head"]}),
        ("qwen3_moe", MOE, {}),
    ],
    ids=["plain", "dora", "rslora-pissa", "head", "experts"],
)
def test_ten_steps_are_peft_s(family: str, config: dict[str, Any], lora: dict[str, Any], tmp_path: Path) -> None:
    folder = base(tmp_path / "base", family, **config)
    strategy = make_strategy("ddp", 1)
    model = AutoModelForCausalLM.from_pretrained(folder, strategy, lora=LoRAConfig(rank=4, **lora)).train()
    save_adapter(model, tmp_path / "adapter")
    theirs = peft_model(folder, tmp_path / "adapter").train()
    names = {f"base_model.model.{name}": parameter for name, parameter in trained_tensors(model).items()}
    counterpart = _peft_parameters(theirs, names)
    ours_optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
    limit, because = 2 * SAFETY * roundoff(4 * 24), f"two runs, each off by {SAFETY:g} times the roundoff of its sums"
    assert len(counterpart) == sum(p.requires_grad for p in theirs.parameters())
    for step in range(10):
        rows = random_rows(4, 24, seed=step)
        expected = reference_step(theirs, rows, optimizer, max_norm=1.0)
        tokens = torch.stack([(row["labels"][:, 1:] != -100).sum() for row in rows]).sum()
        loss = strategy.forward_backward(NextToken(model), [stack(rows)], tokens) / tokens
        norm = strategy.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for what, got in (("loss", loss), ("norm", norm)):
            check_within(what, abs(got.item() / expected[what] - 1), limit, because)
        for name, parameter in names.items():
            assert parameter.grad is not None
            wanted = expected["gradients"][counterpart[name]]
            size = max(float(wanted.norm()), SMALL * min(expected["norm"], 1.0))
            check_within(f"{name} in step {step}", float((parameter.grad - wanted).norm()) / size, limit, because)
        ours_optimizer.step()
        ours_optimizer.zero_grad()


def _peft_parameters(model: Any, names: dict[str, Any]) -> dict[str, str]:
    """PEFT's name on disk -> its name in memory."""
    inserted = {}
    for name in dict(model.named_parameters()):
        saved = name.replace(".default", "").replace(".modules_to_save", "").replace("_vector.weight", "_vector")
        if saved in names and "original_module" not in name:
            inserted[saved] = name
    return inserted


def test_orthogonal_draws_what_peft_draws(tmp_path: Path) -> None:
    model = tiny_model()
    config = peft.LoraConfig(r=4, target_modules=r".*layers\.0\..*q_proj", init_lora_weights="orthogonal")
    theirs = peft.get_peft_model(model, config)
    ours = AutoModelForCausalLM.from_pretrained(
        base(tmp_path), lora=LoRAConfig(rank=4, target_modules=r".*layers\.0\..*q_proj")
    )
    (adapter,) = adapters(ours)
    initialize_adapter(adapter, "orthogonal", 5)
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    torch.manual_seed(5)
    layer.orthogonal_init("default")
    close(adapter.a.weight, layer.lora_A["default"].weight)
    close(adapter.b.weight, layer.lora_B["default"].weight)


def test_training_goes_on_from_a_peft_adapter(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(r=4, target_modules=["v_proj"])
    )
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=1.0)
    for step in range(2):
        reference_step(theirs, random_rows(4, 24, seed=step), optimizer, 1.0)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(folder, lora=LoRAConfig(adapter=str(tmp_path / "adapter")))
    own = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=1.0)
    losses: list[tuple[float, float]] = []
    for step in range(2, 5):
        rows = random_rows(4, 24, seed=step)
        pair = [reference_step(model, rows, steps, 1.0) for model, steps in ((ours, own), (theirs, optimizer))]
        losses.append((pair[0]["loss"], pair[1]["loss"]))
    check_losses(*zip(*losses), tokens=96)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base(tmp_path / "base"), lora=LoRAConfig(rank=4))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder: Path, adapter: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, lora=LoRAConfig(adapter=str(adapter)))


def edit(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_another_base(adapter: Path, tmp_path: Path) -> None:
    wider = base(tmp_path / "wider", hidden_size=64, head_dim=16)
    with pytest.raises(ValueError, match=r"another base model.*\[4, 32\].*gate_proj of shape \[64, 64\]"):
        load(wider, adapter)
    fewer = base(tmp_path / "fewer", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"another base model.*no model.layers.1"):
        load(fewer, adapter)


def test_outputs_of_another_base(adapter: Path, tmp_path: Path) -> None:
    """Inputs agree, outputs do not."""
    other = base(tmp_path / "other", num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"another base model.*\[16, 4\].*\[32, 4\]"):
        load(other, adapter)


def test_missing_config(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_config.json"):
        load(tmp_path / "base", adapter)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r": None}, "not an adapter configuration"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "all"}, "uses bias"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
    ],
)
def test_config_that_is_not_computed_here(adapter: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    edit(adapter, **values)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "base", adapter)


def test_damaged_and_pickled_weights(adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged"):
        load(tmp_path / "base", adapter)
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle can run code"):
        load(tmp_path / "base", adapter)


def test_an_adapter_that_lacks_a_factor(adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file)
    with pytest.raises(ValueError, match=f"lacks {gone.removeprefix('base_model.model.')}"):
        load(tmp_path / "base", adapter)


def test_tied_weights_that_were_trained_apart(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder, lora=LoRAConfig(rank=4, modules_to_save=["embed_tokens"]))
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"different values for .*ties together"):
        load(folder, tmp_path / "adapter")


def test_weights_go_into_the_adapter_that_is_there(adapter: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", lora=LoRAConfig(rank=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="for which the model has no adapter"):
        load_adapter(model, adapter)
    shutil.rmtree(adapter)
    with pytest.raises(ValueError, match="neither a folder here nor"):
        load_adapter(model, adapter)


def test_scaling() -> None:
    assert LoRAConfig(rank=8).scaling(8) == 2
    assert LoRAConfig(rank=16, alpha=4).scaling(16) == 0.25
    assert LoRAConfig(rank=16, alpha=4, use_rslora=True).scaling(16) == pytest.approx(4 / math.sqrt(16))
