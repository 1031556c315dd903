"""Pipelines behind the Trainer: evaluation, generation, checkpoints, bad input."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from automodel_trainer import CausalLMModule, MockDataModule, Trainer
from automodel_trainer.callbacks import Throughput
from automodel_trainer.models.lora import LoRAConfig
from automodel_trainer.modules.optim import OptimizerConfig
from automodel_trainer.nn.flops import flops_per_token
from automodel_trainer.strategies import Parallel3DStrategy, StrategyRegistry
from tests.harness import (
    NextToken,
    check_decided,
    check_run,
    full,
    make_strategy,
    random_rows,
    stack,
    widened,
)
from tests.pool import RankPool
from tests.processes import Job
from tests.tiny import tiny_model, tiny_tokenizer

PROMPT = torch.tensor([[7, 8, 9, 10, 11]])


COMPARED = ("train_loss", "grad_norm", "val_loss", "val_token_accuracy", "lr")
TOKENS = 8 * 16  # of a step


def run(
    root: Path, strategy: str, devices: int, family: str = "llama", precision: str = "32-true", **options: Any
) -> dict[str, Any]:
    """Train, validate, predict and generate; what came out on this rank."""
    model = tiny_model(family, num_hidden_layers=4, **options)
    data = MockDataModule(264, seq_len=16, micro_batch_size=2, global_batch_size=8, num_samples=16, val_samples=5)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, default_root_dir=root, logger=False, max_epochs=1,
        enable_progress_bar=False, enable_checkpointing=False, log_every_n_steps=1, num_sanity_val_steps=0,
        callbacks=[Throughput()], precision=precision,
    )  # fmt: skip
    module = CausalLMModule(model, tokenizer=tiny_tokenizer(), lr=1e-2, optimizer=OptimizerConfig(args={"eps": 1e-3}))
    with widened(precision):
        trainer.fit(module, data)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        with torch.no_grad():
            generated = module.generate(PROMPT, max_new_tokens=6, do_sample=False)
            logits = module.model(generated[:, :-1]).logits[0, PROMPT.shape[1] - 1 :] if devices == 1 else None
        scored = trainer.predict(module, data.val_dataloader()) or []
    return {
        "logits": logits,  # of the generated tokens
        "metrics": metrics,
        "generated": generated.tolist(),
        "scores": torch.cat([part["log_probs"] for batch in scored for part in batch]),
        "weights": {name: full(p).detach().clone() for name, p in module.model.named_parameters()},
    }


@pytest.mark.parametrize(
    ("strategy", "devices", "family", "options"),
    [
        ("3d:pp=2", 2, "llama", {"tie_word_embeddings": True}),
        ("3d:pp=2,tp=2,schedule=zbv", 4, "gemma3_text", {}),
    ],
)
def test_trainer(
    pool: RankPool, tmp_path: Path, strategy: str, devices: int, family: str, options: dict[str, Any]
) -> None:
    """Losses, metrics, scores and generated tokens are known on every rank and are those of one device."""
    expected = run(tmp_path / "exact", "auto", 1, family, precision="64-true", **options)
    near = run(tmp_path / "one", "auto", 1, family, **options)
    check_decided(expected["logits"], near["logits"])
    for result in pool.run(devices, run, tmp_path / "pipeline", strategy, devices, family, **options):
        metrics = result["metrics"]
        found, exact, one = ({n: r["metrics"][n] for n in COMPARED} for r in (result, expected, near))
        check_run(found, exact, one, TOKENS)
        assert 0 < metrics["pipeline_bubble"] < 1
        # every device's share of what the whole model takes
        flops = flops_per_token(tiny_model(family, num_hidden_layers=4, **options), 16)
        assert metrics["tflops_per_device"] * 1e12 == pytest.approx(flops * metrics["tokens_per_second"] / devices)
        assert result["generated"] == expected["generated"]
        check_run({"": result["scores"]}, {"": expected["scores"]}, {"": near["scores"]}, TOKENS)
        names = result["weights"].keys()  # of this rank's stages
        exact, one = ({name: r["weights"][name] for name in names} for r in (expected, near))
        check_run(result["weights"], exact, one, TOKENS)


def fit(
    root: Path,
    strategy: str,
    devices: int,
    folder: Path,
    lora: bool,
    epochs: int,
    resume: Path | None,
    precision: str = "32-true",
) -> Any:
    """Train from a folder on disk, save a checkpoint and export; the losses and where things are."""
    data = MockDataModule(264, seq_len=16, micro_batch_size=2, global_batch_size=8, num_samples=16, val_samples=5)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, default_root_dir=root, logger=False, max_epochs=epochs,
        enable_progress_bar=False, log_every_n_steps=1, num_sanity_val_steps=0, precision=precision,
    )  # fmt: skip
    module = CausalLMModule(
        str(folder), lr=1e-2, scheduler="constant", optimizer=OptimizerConfig(args={"eps": 1e-3}),
        lora=LoRAConfig(rank=4, init="orthogonal") if lora else None,
    )  # fmt: skip
    with warnings.catch_warnings(), widened(precision):
        warnings.filterwarnings("error", message=".*does not have.*")
        checkpoint = trainer.fit(module, data, ckpt_path=resume)
    export = trainer.save_pretrained(root / "export")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"checkpoint": checkpoint, "export": export, "metrics": metrics}


@pytest.mark.parametrize(
    ("strategy", "devices", "family", "lora"),
    [("3d:pp=2,schedule=zbv", 4, "qwen3", False), ("3d:pp=2", 2, "llama", True)],
)
def test_checkpoints(pool: RankPool, tmp_path: Path, strategy: str, devices: int, family: str, lora: bool) -> None:
    """Each rank reads its own layers; checkpoint and export hold all, once; training goes on from them exactly."""
    source = tmp_path / "model"
    tiny_model(family, num_hidden_layers=4, tie_word_embeddings=True).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    exact = fit(tmp_path / "exact", "auto", 1, source, lora, 2, None, "64-true")
    near = fit(tmp_path / "one", "auto", 1, source, lora, 2, None)
    half = pool.run(devices, fit, tmp_path / "half", strategy, devices, source, lora, 1, None)[0]
    here = pool.run(devices, fit, tmp_path / "here", strategy, devices, source, lora, 2, half["checkpoint"])[0]
    elsewhere = fit(tmp_path / "elsewhere", "auto", 1, source, lora, 2, half["checkpoint"])
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    for result in (here, elsewhere):
        metrics = ({n: r["metrics"][n] for n in COMPARED[:3]} for r in (result, exact, near))
        check_run(*metrics, TOKENS)
        check_run(*(load_file(r["export"] / name) for r in (result, exact, near)), TOKENS)
    if lora:
        configs = [json.loads((r["export"] / "adapter_config.json").read_text()) for r in (here, near)]
        assert configs[0] == configs[1]


BAD = {
    "more stages than layers": (
        "3d:pp=2,schedule=zbv",
        {"num_hidden_layers": 3},
        8,
        "pp up to 1 with schedule='zbv', up to 3 ",
    ),
    "a split that does not add up": ("3d:pp=2", {"split": [1, 2]}, 8, "4 in all"),
    "too few micro-batches": ("3d:pp=2", {}, 2, "at least 2 micro-batches"),
    "a stage with nothing to train": ("3d:pp=2", {"frozen": True}, 8, "nothing to train"),
}


def attempt(root: Path, strategy: str, options: dict[str, Any], batch: int, wanted: str) -> None:
    options = {"num_hidden_layers": 4, **options}
    chosen: Any = StrategyRegistry.get(strategy)
    chosen.split = options.pop("split", None)
    frozen, family = options.pop("frozen", False), options.pop("family", "llama")
    model = tiny_model(family, **options)
    if frozen:
        for parameter in model.model.layers[:2].parameters():
            parameter.requires_grad_(False)
        model.model.embed_tokens.requires_grad_(False)
    data = MockDataModule(264, seq_len=16, micro_batch_size=2, global_batch_size=batch, num_samples=16)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=chosen, default_root_dir=root, logger=False, max_steps=1,
        enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(wanted)):
        trainer.fit(CausalLMModule(model, tokenizer=tiny_tokenizer()), data)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(pool: RankPool, tmp_path: Path, case: str) -> None:
    """Errors, on every rank, that say what would work."""
    strategy, options, batch, wanted = BAD[case]
    pool.run(2, attempt, tmp_path, strategy, options, batch, wanted)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("3d:schedule=1f1", "Did you mean '1f1b'"),
        ("3d:virtual_stages=2", "interleaved_1f1b"),
        ("3d:schedule=zbv,virtual_stages=3", "two stages per rank"),
        ("3d:split=even", "'auto'"),
    ],
)
def test_bad_options(spec: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        StrategyRegistry.get(spec)


def break_down(root: Path) -> None:
    """The last stage's rank raises in the backward of the second step."""
    strategy = make_strategy("3d:pp=2", 2)
    assert isinstance(strategy, Parallel3DStrategy)
    model = strategy.parallelize(tiny_model("llama", num_hidden_layers=4))
    objective = NextToken(model)
    micro_batches = [stack(random_rows(1, 8, seed=i)) for i in range(4)]
    strategy.forward_backward(objective, micro_batches, torch.tensor(10))
    assert strategy.pipeline is not None
    assert strategy.pipeline.place == ""
    calls = []

    def fail(grad: torch.Tensor) -> None:
        calls.append(grad)
        if len(calls) == 3:
            raise ArithmeticError("planted in the backward of micro-batch 2")

    if strategy.global_rank == 1:
        model.model.layers[3].mlp.down_proj.weight.register_hook(fail)
    strategy.forward_backward(objective, micro_batches, torch.tensor(10))


def test_a_rank_that_raises_takes_the_others_down(tmp_path: Path) -> None:
    """The other rank stops waiting, and says where it was."""
    job = Job(tmp_path, break_down, tmp_path, world_size=2)
    assert all(job.wait(timeout=600))  # a rank that waited for the other would wait for half an hour
    assert "planted in the backward of micro-batch 2" in job.log(1)
    assert "Pipeline rank 1 of 2: backward of micro-batch 2 on stage 1." in job.log(1)
    assert "waiting for gradients from stage 1 (pipeline rank 1)." in job.log(0)
