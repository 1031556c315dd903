"""Adapters of models that are not all linear layers, of resized vocabularies and tied embeddings; PEFT's objects."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig
from transformers import AutoModelForCausalLM as Transformers

from automodel_trainer import AutoModelForCausalLM
from automodel_trainer.checkpoint.merge import merge
from automodel_trainer.data import MockDataModule
from automodel_trainer.models.lora import LoRAConfig, adapters, apply_lora, describe_lora, finish_lora
from automodel_trainer.models.lora.adapter_files import save_adapter
from automodel_trainer.models.lora.targets import candidates
from automodel_trainer.modules import CausalLMModule
from automodel_trainer.trainer import Trainer
from tests.harness import make_strategy
from tests.limits import CHAIN, WIDTH, check_step, close
from tests.models.test_lora_peft import disturb, peft_model
from tests.pool import RankPool
from tests.tiny import tiny_model, tiny_tokenizer

IDS = torch.arange(6, 30).view(2, 12)
QUIET: dict[str, Any] = {"devices": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
QUIET |= {"enable_progress_bar": False, "enable_ledger": False, "max_steps": 2}


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(**{**QUIET, **options}, default_root_dir=folder)


def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits.detach()


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients by PEFT's names."""
    model(input_ids=IDS, labels=IDS).loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {
        name.removeprefix("base_model.model.").replace(".default", "").replace("vector.weight", "vector"): grad
        for name, grad in named.items()
    }


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init": "pissa"}], ids=["plain", "dora", "pissa"])
def test_conv1d_is_peft_s(tmp_path: Path, options: dict[str, Any]) -> None:
    """GPT-2's linear layers hold their weights as `[in, out]`."""
    tiny_model("gpt2").save_pretrained(tmp_path / "base")
    lora = LoRAConfig(rank=2, target_modules=["c_attn", "attn.c_proj"], **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", lora=lora)
    close(logits(model), logits(tiny_model("gpt2")), CHAIN * WIDTH)
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    merge(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    torch.testing.assert_close(logits(Transformers.from_pretrained(tmp_path / "merged")), logits(model))
    if options.get("init") == "pissa":
        return  # PEFT would take the factors out of the base once more
    theirs = peft_model(tmp_path / "base", tmp_path / "adapter")
    close(logits(theirs), logits(model), CHAIN * WIDTH)
    check_step((1.0, gradients(model)), (1.0, gradients(theirs)), IDS.numel())

    theirs.save_pretrained(tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", lora=LoRAConfig(adapter=str(tmp_path / "theirs")))
    torch.testing.assert_close(logits(again), logits(model))


def test_conv1d_targets() -> None:
    model = apply_lora(tiny_model("gpt2"), LoRAConfig(rank=2))
    assert "4 × attn.c_attn" not in str(describe_lora(model))
    assert {adapter.target.rpartition(".")[2] for adapter in adapters(model)} == {"c_attn", "c_proj", "c_fc"}
    with pytest.raises(ValueError, match=r"Conv1D.*module's name: 'c_attn'"):
        apply_lora(tiny_model("gpt2"), LoRAConfig(rank=2, target_modules=["c_attn.weight"]))
    with pytest.raises(ValueError, match=r"quantize='nf4'.*Conv1D"):
        apply_lora(tiny_model("gpt2"), LoRAConfig(rank=2, quantize="nf4"))


def test_parameters_of_three_dimensions_that_are_no_experts() -> None:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = tiny_model("qwen3_next", **linear, **moe, linear_value_head_dim=8, shared_expert_intermediate_size=32)
    three = {name for name, parameter in model.named_parameters() if parameter.ndim == 3}
    assert any("conv1d" in name for name in three)
    meant = {name for name, is_meant in candidates(model).items() if is_meant}
    assert {name for name in three if "experts" in name} <= meant
    assert not {name for name in three if "conv1d" in name} & candidates(model).keys()


# --- embeddings -------------------------------------------------------------------------------------------------------


def larger(folder: Path) -> Any:
    """The model of a folder with two more tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Transformers.from_pretrained(folder)
        model.resize_token_embeddings(266)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", [[], ["embed_tokens"]])
def test_resized_embeddings(tmp_path: Path, tied: bool, saved: list[str]) -> None:
    """They are saved as PEFT saves them, merged, continued, and PEFT's own are read."""
    base = tmp_path / "base"
    tiny_model(tie_word_embeddings=tied).save_pretrained(base)
    torch.manual_seed(0)
    model = larger(base)
    apply_lora(model, LoRAConfig(rank=2, modules_to_save=saved))
    finish_lora(model)
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    whole = {name for name in tensors if "lora" not in name}
    assert whole == {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert bool(config["modules_to_save"]) == bool(saved)

    tiny_tokenizer().save_pretrained(base)
    merge(tmp_path / "adapter", tmp_path / "merged", base)
    merged = Transformers.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 266
    torch.testing.assert_close(logits(merged), logits(model))

    again = AutoModelForCausalLM.from_pretrained(base, lora=LoRAConfig(adapter=str(tmp_path / "adapter")))
    torch.testing.assert_close(logits(again), logits(model))
    trained = {name for name, p in again.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == ({"model.embed_tokens.weight"} if saved else set())

    if not saved:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(larger(base), str(tmp_path / "adapter"))
        torch.testing.assert_close(logits(theirs), logits(model))


@pytest.mark.parametrize("whole", [None, ["embed_tokens", "lm_head"]])
def test_peft_s_adapter_of_a_resized_model(tmp_path: Path, whole: list[str] | None) -> None:
    """PEFT writes resized embeddings that are trained whole three times."""
    base = tmp_path / "base"
    tiny_model(tie_word_embeddings=not whole).save_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=whole)
    theirs = peft.get_peft_model(larger(base), config)
    disturb(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    model = AutoModelForCausalLM.from_pretrained(base, lora=LoRAConfig(adapter=str(tmp_path / "theirs")))
    torch.testing.assert_close(logits(model), logits(theirs))
    merge(tmp_path / "theirs", tmp_path / "merged", base)
    torch.testing.assert_close(logits(Transformers.from_pretrained(tmp_path / "merged")), logits(theirs))


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_peft_unties_what_it_trains_whole(tmp_path: Path, module: str) -> None:
    """It trains a copy of one of two tied weights; the other one keeps the base's values."""
    base = tmp_path / "base"
    tiny_model(tie_word_embeddings=True).save_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = theirs_of(base, modules_to_save=[module])
        disturb(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
    model = AutoModelForCausalLM.from_pretrained(base, lora=LoRAConfig(adapter=str(tmp_path / "theirs")))
    torch.testing.assert_close(logits(model), logits(theirs))
    save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(logits(peft_model(base, tmp_path / "ours")), logits(theirs))
    merge(tmp_path / "theirs", tmp_path / "merged", base)
    torch.testing.assert_close(logits(Transformers.from_pretrained(tmp_path / "merged")), logits(theirs))


# --- a PeftModel in fit -----------------------------------------------------------------------------------------------


def theirs_of(base: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, **{"target_modules": ["q_proj", "up_proj"], **options})
    return peft.get_peft_model(Transformers.from_pretrained(base), config)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_fit_trains_the_adapter_of_a_peft_model(tmp_path: Path, saved: list[str] | None) -> None:
    base = tmp_path / "base"
    tiny_model(tie_word_embeddings=False).save_pretrained(base)
    model = theirs_of(base, modules_to_save=saved)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = MockDataModule(vocab_size=264, seq_len=16, num_samples=8, micro_batch_size=2)
    run = trainer(tmp_path)
    run.fit(CausalLMModule(model, lr=1e-2), data)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    assert any("lora_A" in name for name in changed)
    assert any("modules_to_save" in name for name in changed) == bool(saved)
    torch.testing.assert_close(logits(model), logits(run.lightning_module.model))  # type: ignore[union-attr]
    run.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(peft_model(base, tmp_path / "saved")), logits(model))

    # the same run from PEFT's files
    theirs_of(base, modules_to_save=saved).save_pretrained(tmp_path / "start")
    other = trainer(tmp_path)
    other.fit(CausalLMModule(base, lora=LoRAConfig(adapter=str(tmp_path / "start")), lr=1e-2), data)
    torch.testing.assert_close(logits(other.lightning_module.model), logits(model))  # type: ignore[union-attr]


def fit_on_two_ranks(base: Path, folder: Path, spec: str) -> tuple[list[str], Tensor]:
    model = theirs_of(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = MockDataModule(vocab_size=264, seq_len=16, num_samples=8, micro_batch_size=2)
    trainer(folder, devices=2, strategy=spec).fit(CausalLMModule(model, lr=1e-2), data)
    return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])], logits(model)


def test_every_rank_s_peft_model_has_the_trained_values(pool: RankPool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model(tie_word_embeddings=True).save_pretrained(base)
    (first, found), (second, other) = pool.run(2, fit_on_two_ranks, base, tmp_path, "fsdp2")
    assert first == second
    assert first
    assert all("lora_" in name for name in first)
    close(found, other, CHAIN * WIDTH)


def resized_on_stages(base: Path, adapter: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        base, make_strategy("3d:pp=2", 2), lora=LoRAConfig(adapter=str(adapter))
    )
    save_adapter(model, folder)


def test_resized_embeddings_on_pipeline_stages(pool: RankPool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model(tie_word_embeddings=False).save_pretrained(base)
    model = larger(base)
    apply_lora(model, LoRAConfig(rank=2))
    finish_lora(model)
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    pool.run(2, resized_on_stages, base, tmp_path / "adapter", tmp_path / "again")
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("adapter", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [(tmp_path / n / "adapter_config.json").read_text() for n in ("adapter", "again")]
    assert json.loads(configs[0])["modules_to_save"] is json.loads(configs[1])["modules_to_save"] is None


def test_peft_models_that_are_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has an adapter already: leave out lora"):
        CausalLMModule(theirs_of(tmp_path), lora=LoRAConfig())
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa'.*LoRAConfig\(rank=2"):
        CausalLMModule(theirs_of(tmp_path, init_lora_weights="pissa"))
    inside = Transformers.from_pretrained(tmp_path)
    inside.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=5))
    with pytest.raises(ValueError, match=r"q_proj.*LoRAConfig\(rank=2, alpha=5, target_modules=\['q_proj'\]\)"):
        CausalLMModule(inside)
    with pytest.raises(ValueError, match=r"model is a OptimizedModule.*the model inside"):
        CausalLMModule(torch.compile(tiny_model()))  # type: ignore[arg-type]
    frozen = theirs_of(tmp_path)
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        CausalLMModule(frozen)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter; only LORA"):
        trainer(tmp_path).fit(
            peft.get_peft_model(Transformers.from_pretrained(tmp_path), prompt),
            MockDataModule(vocab_size=264, seq_len=16, num_samples=2),
        )


class Router(torch.nn.Linear):
    """A linear layer that returns its choice too, as those of some families do."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return scores.argmax(-1), scores


class Scaled(torch.nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_linear_layers_that_return_something_else_are_single_matrices() -> None:
    model = torch.nn.ModuleDict({"router": Router(4, 3), "scaled": Scaled(4, 3), "plain": torch.nn.Linear(4, 3)})
    assert candidates(model) == {"router.weight": False, "scaled": True, "plain": True}


def test_a_model_s_rules_do_not_draw_adapters() -> None:
    """This family looks for the biases of gates by the names of modules, and adapters inside of them have none."""
    config = AutoConfig.for_model(
        "xlstm", hidden_size=32, embedding_dim=32, num_heads=4, num_hidden_layers=1, num_blocks=1, vocab_size=32
    )
    model = AutoModelForCausalLM.from_config(config, lora=LoRAConfig(rank=2))
    assert all(p.isfinite().all() for p in model.parameters())
