"""The ledger's facts against what was set up, and the surprises that stop a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from automodel_trainer.callbacks import Ledger
from automodel_trainer.callbacks.console import block
from automodel_trainer.callbacks.ledger_text import batch_text
from automodel_trainer.models.lora import LoRAConfig, apply_lora, finish_lora
from automodel_trainer.modules import CausalLMModule
from automodel_trainer.nn.text import listed
from automodel_trainer.trainer import Trainer
from tests.pool import RankPool
from tests.tiny import tiny_model

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
}


def micro_batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 200, (2, 8))
    return {"input_ids": ids, "labels": ids.clone()}


def fit(model: PreTrainedModel, ledger: Ledger, folder: Any, steps: int = 1, **options: Any) -> Ledger:
    module = CausalLMModule(model, **({"optimizer": options.pop("optimizer")} if "optimizer" in options else {}))
    trainer = Trainer(**{**QUIET, **options}, callbacks=[ledger], max_steps=steps, default_root_dir=folder)
    trainer.fit(module, [[micro_batch(), micro_batch(), micro_batch()] for _ in range(steps)])
    return ledger


def unused_parameter(model: PreTrainedModel) -> PreTrainedModel:
    model.model.unused = nn.Parameter(torch.ones(4))
    return model


def test_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.model.embed_tokens.requires_grad_(False)
    frozen = model.model.embed_tokens.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    facts = fit(model, Ledger(), tmp_path, steps=3).facts
    assert facts["model"]["class"] == "LlamaForCausalLM"
    assert (facts["model"]["trained"], facts["model"]["frozen"]) == (total - frozen, frozen)
    assert facts["model"]["bytes"] == {"float32": 4 * total}
    assert facts["gradients"]["bytes"] == {"float32": 4 * (total - frozen)}
    assert facts["optimizer"]["bytes"] == {"float32": 8 * (total - frozen)}  # two moments
    assert facts["model"]["tied"] == ["lm_head.weight = model.embed_tokens.weight"]
    assert facts["model"]["attention"] == ["sdpa"]
    assert facts["gradients"]["missing"] == facts["gradients"]["all_zero"] == []
    assert facts["run"]["batch"] == {"micro": 2, "accumulation": 3, "dp": 1, "global": 6, "tokens": 48}
    assert facts["run"]["steps"] == 3
    assert facts["run"]["mesh"] == {"dp_shard": 1}
    assert json.loads((tmp_path / "ledger.json").read_text()) == facts
    printed = capsys.readouterr().out
    assert printed.count("ledger\n") == 1
    assert "micro 2 × accumulation 3 × dp 1 = global 6 rows, ≤ 48 tokens" in printed
    assert f"{total - frozen:,} trained" in printed


def test_experts_are_told(tmp_path: Path) -> None:
    """What computes them, and whether the configured balancing loss is used."""
    facts = []
    for used in (False, True):
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        model = tiny_model("qwen3_moe", router_aux_loss_coef=0.01, output_router_logits=used, **sizes)
        facts.append(fit(model, Ledger(), tmp_path).facts["model"]["experts"])
    assert facts[0] == (
        "grouped_mm (transformers' experts_implementation); router_aux_loss_coef=0.01 is not used: "
        "output_router_logits is off"
    )
    assert facts[1] == (
        "grouped_mm (transformers' experts_implementation); balanced by aux_loss 0.01 over the global batch"
    )
    assert fit(tiny_model(), Ledger(), tmp_path).facts["model"]["experts"] is None


def test_a_trainable_parameter_without_gradient_stops_the_run_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.unused.*allow=\['no_grad'\]"):
        fit(unused_parameter(tiny_model()), Ledger(), tmp_path)
    allowed = fit(unused_parameter(tiny_model()), Ledger(allow=["no_grad"]), tmp_path, steps=2)
    assert allowed.facts["gradients"]["missing"] == ["model.unused"]


def test_adapters_that_the_model_does_not_use_are_named_with_what_to_leave_out(tmp_path: Path) -> None:
    """This layer's weight is read, and the layer never called."""
    model = tiny_model("falcon_mamba", state_size=4)
    model = apply_lora(model, LoRAConfig(rank=2))
    finish_lora(model)
    with pytest.raises(
        ValueError, match=r"their adapters do nothing. Leave them out: lora exclude=\['mixer.dt_proj'\]"
    ):
        fit(model, Ledger(), tmp_path)


def test_a_trainable_parameter_in_no_optimizer_stops_the_run_unless_allowed(tmp_path: Path) -> None:
    def forgetful(groups: Any) -> torch.optim.Optimizer:
        groups[0]["params"] = groups[0]["params"][1:]
        return torch.optim.SGD(groups, lr=0.1)

    message = r"1 trainable parameter\(s\) are in no optimizer: model\.embed_tokens\.weight.*allow=\['not_optimized'\]"
    with pytest.raises(ValueError, match=message):
        fit(tiny_model(), Ledger(allow=["no_grad"]), tmp_path, optimizer=forgetful)
    fit(tiny_model(), Ledger(allow=["not_optimized"]), tmp_path, optimizer=forgetful)


def test_gradients_that_are_all_zero_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    model.model.norm.register_forward_hook(lambda module, inputs, output: output.detach() + 0 * output)
    facts = fit(model, Ledger(), tmp_path).facts
    assert "model.norm.weight" in facts["gradients"]["all_zero"]
    assert "lm_head.weight" not in facts["gradients"]["all_zero"]
    assert "⚠ all zero for" in capsys.readouterr().out


class HalfMomentum(torch.optim.SGD):
    """Keeps its momentum in bf16."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        return loss


def test_half_precision_optimizer_state_stops_the_run_unless_asked_for(tmp_path: Path) -> None:
    def optimizer(groups: Any) -> HalfMomentum:
        return HalfMomentum(groups, lr=0.1)

    with pytest.raises(ValueError, match=r"bfloat16.*'32-true'.*allow=\['low_precision_state'\]"):
        fit(tiny_model(), Ledger(), tmp_path, optimizer=optimizer)
    fit(tiny_model(), Ledger(allow=("low_precision_state",)), tmp_path, optimizer=optimizer)
    asked = fit(tiny_model(), Ledger(), tmp_path, precision="bf16-true")
    assert asked.facts["optimizer"]["bytes"].keys() == {"bfloat16"}


def test_mixed_precision_keeps_everything_that_is_remembered_in_fp32(tmp_path: Path) -> None:
    facts = fit(tiny_model(), Ledger(), tmp_path, precision="bf16").facts
    sizes = (facts["model"]["bytes"], facts["gradients"]["bytes"], facts["optimizer"]["bytes"])
    assert [size.keys() for size in sizes] == [{"float32"}] * 3


def test_an_untied_pair_stops_the_run_unless_allowed(tmp_path: Path) -> None:
    def untied() -> PreTrainedModel:
        model = tiny_model(tie_word_embeddings=True)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    with pytest.raises(ValueError, match=r"lm_head\.weight ≠ model\.embed_tokens\.weight.*allow=\['untied'\]"):
        fit(untied(), Ledger(), tmp_path)
    assert fit(untied(), Ledger(allow=["untied"]), tmp_path).facts["model"]["tied"] == []


def on_ranks(strategy: str, folder: str, unused: bool) -> dict[str, Any] | str:
    model = unused_parameter(tiny_model()) if unused else tiny_model(tie_word_embeddings=True)
    model.lm_head.scale = nn.Parameter(torch.ones(1))  # too small to be sharded: every rank but one holds nothing
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * module.scale)
    try:
        return fit(model, Ledger(), folder, devices=2, strategy=strategy).facts
    except ValueError as error:
        return str(error)


def test_sharded_facts_are_of_the_whole_model_and_bytes_of_the_rank(pool: RankPool, tmp_path: Path) -> None:
    total = sum(p.numel() for p in tiny_model(tie_word_embeddings=True).parameters()) + 1
    first, second = pool.run(2, on_ranks, "fsdp2", str(tmp_path), False)
    assert first["model"]["trained"] == second["model"]["trained"] == total
    bytes_held = [facts["model"]["bytes"]["float32"] for facts in (first, second)]
    assert sum(bytes_held) == 4 * total
    assert max(bytes_held) - min(bytes_held) == 4
    assert second["gradients"]["missing"] == []
    assert first["model"]["tied"] == ["lm_head.weight = model.embed_tokens.weight"]
    assert first["run"]["mesh"] == {"dp_shard": 2}
    assert first["run"]["batch"]["global"] == 12
    assert json.loads((tmp_path / "ledger.json").read_text()) == first


def test_all_ranks_stop_together(pool: RankPool, tmp_path: Path) -> None:
    for message in pool.run(2, on_ranks, "fsdp2", str(tmp_path), True):
        assert "model.unused" in message


class Own(pl.LightningModule):
    """A user's own module, with a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.used(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


@pytest.mark.parametrize("trainer_class", [Trainer, pl.Trainer])
def test_a_users_module_may_have_unused_layers(
    trainer_class: type[pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=2)
    ledger = Ledger()
    options = {
        **QUIET,
        "callbacks": [ledger],
        "max_epochs": 1,
        "accumulate_grad_batches": 2,
        "enable_model_summary": False,
    }
    trainer_class(**options, default_root_dir=tmp_path).fit(Own(), data)
    assert ledger.facts["gradients"]["missing"] == ["unused.weight", "unused.bias"]
    assert ledger.facts["model"]["trained"] == 20
    assert ledger.facts["run"]["batch"] == {"micro": 2, "accumulation": 2, "dp": 1, "global": 4, "tokens": 0}
    assert ledger.facts["run"]["steps"] == 2
    printed = capsys.readouterr().out
    assert "⚠ none for 2 of 4: unused.weight, unused.bias" in printed
    assert "micro 2 × accumulation 2 × dp 1 = global 4 rows\n" in printed


@pytest.mark.parametrize("allow", [["no_gard"], "no_grad"])
def test_an_unknown_switch_is_refused(allow: Any) -> None:
    with pytest.raises(ValueError, match="no_grad, not_optimized, low_precision_state, untied"):
        Ledger(allow=allow)


def test_texts() -> None:
    batch = {"micro": 2, "accumulation": 4, "dp": 8, "global": 64, "tokens": 131072}
    assert batch_text(batch) == "micro 2 × accumulation 4 × dp 8 = global 64 rows, ≤ 131,072 tokens"
    assert listed(list("abcde"), 3) == "a, b, c and 2 more"


def test_a_block_is_plain_in_a_file_and_framed_in_a_terminal() -> None:
    rows = [("model", "A"), ("parameters", "[1, 2]"), ("gradients", "⚠ none")]
    assert block("ledger", rows, terminal=False).splitlines() == [
        "ledger",
        "  model       A",
        "  parameters  [1, 2]",
        "  gradients   ⚠ none",
    ]
    framed = block("ledger", rows, terminal=True, width=60)
    assert framed.startswith("\x1b[2m╭─")
    assert "[1, 2]" in framed
    assert "\x1b[33m⚠ none" in framed


def test_compiled_blocks_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = "auto:compile=true,compile_backend=aot_eager"
    facts = fit(tiny_model(), Ledger(), tmp_path, strategy=strategy).facts
    assert facts["run"]["compile"] == "aot_eager"
    assert facts["run"]["compile_options"] is None
    assert "blocks compiled (aot_eager)" in capsys.readouterr().out
    assert fit(tiny_model(), Ledger(), tmp_path).facts["run"]["compile"] is None
    assert "compiled" not in capsys.readouterr().out
