"""FSDP2 gathering trained weights in fp8, emulated on CPU ranks, against one rank that casts whole weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from automodel_trainer.callbacks import DCPCheckpoint
from automodel_trainer.models.kernels import choose as kernels
from automodel_trainer.models.kernels.choose import KernelsConfig
from automodel_trainer.models.kernels.fp8 import convert_to_fp8
from automodel_trainer.models.quantization.fp8_layers import Fp8Layers, check_gathered, fp8_layers
from tests.beside import use
from tests.callbacks import runs
from tests.harness import Batch, NextToken, adamw, make_strategy, once, random_rows, relative_error, train_steps
from tests.limits import check_casts
from tests.matrix import more
from tests.pool import RankPool
from tests.strategies.test_parity import EPS, LR
from tests.tiny import tiny_model

CPU = torch.device("cpu")
ROWS, MICRO = 24, 2


@pytest.fixture(autouse=True)
def _torchao() -> None:
    use("torchao")


def rows_of(step: int, order_of: int = 1) -> list[Batch]:
    """In the order in which one rank takes the micro-batches of `order_of` ranks: scales are a micro-batch's own."""
    rows = random_rows(ROWS, 24, seed=step)
    return [row for first in range(order_of) for row in rows[first::order_of]]


def train(
    spec: str,
    world_size: int,
    family: str,
    gather: bool | str,
    precision: str = "fp32",
    order_of: int = 1,
    layers: int = 2,
    fp8: bool = True,
) -> dict[str, Any]:
    use("torchao")
    strategy = make_strategy(spec, world_size, precision)
    model = tiny_model(family, tie_word_embeddings=family == "qwen2", num_hidden_layers=layers)
    if family == "qwen2":  # with biases, which are gathered as they are
        randomise_biases(model)
    if fp8:
        convert_to_fp8(model, "tensorwise", CPU, emulate=True, all_gather=gather)
    model = strategy.parallelize(model.train())
    seen = {} if "compile" in spec else watch(model)  # hooks that note things would be compiled again after each
    optimizer = adamw(model.parameters(), LR, EPS)
    result = train_steps(strategy, NextToken(model), optimizer, lambda s: rows_of(s, order_of), MICRO)
    return {**result, "seen": seen, "text": str(fp8_layers(model))}


def randomise_biases(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1, generator=generator)


def watch(model: Any) -> dict[str, Any]:
    """What the last block's layers multiply with, and the whole master weight at that time."""
    seen: dict[str, Any] = {}

    def look(module: Any, args: Any, name: str) -> None:
        weight = module.weight
        if name not in seen and hasattr(weight, "_data"):
            seen[name] = (weight._data.clone(), weight._scale.clone(), weight.dtype)

    for name, module in model.model.layers[-1].named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(functools.partial(look, name=name))
    return seen


@once
def train_alone(pool: RankPool, spec: str, family: str, order_of: int, layers: int, fp8: bool = True) -> dict[str, Any]:
    return pool.run(1, train, spec, 1, family, "auto", order_of=order_of, layers=layers, fp8=fp8)[0]


@pytest.mark.parametrize(
    ("spec", "world_size", "family"),
    [
        more("fsdp2", 2, "llama"),
        ("fsdp2", 3, "qwen2"),  # uneven shards, biases, a tied embedding
        ("hsdp", 4, "llama"),
        ("fsdp2:reshard_after_forward=false,sync_every_micro_batch=true,forward_prefetch=1", 4, "llama"),
        ("fsdp2:compile=true,compile_backend=aot_eager,activation_checkpointing=full", 2, "llama"),
    ],
)  # fmt: skip
def test_ranks_train_as_one_that_casts_whole_weights(pool: RankPool, spec: str, world_size: int, family: str) -> None:
    """With accumulation and clipping; what layers multiply with are the codes of the whole weight."""
    compiled = "compile" in spec  # which takes long for a block
    alone, layers = ("fsdp2:compile=true,compile_backend=aot_eager", 1) if compiled else ("auto", 2)
    expected = train_alone(pool, alone, family, world_size, layers)
    results = pool.run(world_size, train, spec, world_size, family, True, layers=layers)
    exact = train_alone(pool, "auto", family, world_size, layers, fp8=False)
    for result in results:
        check_casts(result, expected, exact, ROWS * 24)
    assert not expected["seen"]
    assert f"{7 * layers} weights gathered in fp8" in results[0]["text"]
    assert "gathered" not in expected["text"]
    if not compiled:
        check_codes(results[-1]["seen"], family, torch.float32)


def check_codes(seen: dict[str, Any], family: str, looks_like: torch.dtype) -> None:
    """They are the whole weight's, cast here as arithmetic says."""
    weights = tiny_model(family, tie_word_embeddings=family == "qwen2").state_dict()
    assert len(seen) == 7
    for name, (codes, scale, dtype) in seen.items():
        weight = weights[f"model.layers.1.{name}.weight"]
        assert codes.dtype == torch.float8_e4m3fn
        assert dtype == looks_like
        assert scale.item() == pytest.approx(448 / weight.abs().max().item())
        assert torch.equal(codes.float(), (weight * scale).to(torch.float8_e4m3fn).float())


def test_master_weights_in_fp32(pool: RankPool) -> None:
    """Under bf16 the cast begins at the fp32 weight; what comes of it is as near as what casting the bf16 one gives."""
    off, on = (pool.run(2, train, "fsdp2", 2, "llama", gather, "bf16")[0] for gather in (False, "auto"))
    check_codes(on["seen"], "llama", torch.bfloat16)
    assert not off["seen"]
    assert {weight.dtype for weight in on["weights"].values()} == {torch.float32}
    for got, want in zip(on["history"], off["history"], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-3)
    first, wanted = on["history"][0]["gradients"], off["history"][0]["gradients"]
    together = [torch.cat([gradients[name].flatten() for name in wanted]) for gradients in (first, wanted)]
    assert 0 < relative_error(*together) < 0.06


def fit(
    root: Path, strategy: str, devices: int, gather: bool | str, steps: int, resume: Path | None = None
) -> dict[str, Any]:
    """A run through the Trainer, with validation, whose model computes in fp8."""
    use("torchao")
    before, make = kernels.convert_to_fp8, runs.CausalLMModule
    chosen = KernelsConfig(fp8="tensorwise", fp8_all_gather=gather, attention="eager")  # type: ignore[arg-type]
    kernels.convert_to_fp8 = functools.partial(convert_to_fp8, emulate=True)
    runs.CausalLMModule = functools.partial(make, kernels=chosen)  # type: ignore[assignment, misc]
    try:
        layout: dict[str, Any] = {"strategy": strategy, "devices": devices}
        options = {"max_epochs": -1, "max_steps": steps, "val_check_interval": 2, "scheduler": "constant"}
        found = runs.train(
            root, [DCPCheckpoint(every_n_steps=2)], attention_dropout=0.0, ckpt_path=resume, **layout, **options
        )
    finally:
        kernels.convert_to_fp8, runs.CausalLMModule = before, make  # type: ignore[misc]
    layers = fp8_layers(found["trainer"].lightning_module.model)
    losses = [entry[3] for entry in found["journal"] if entry[0] == "train"]
    validated = [entry[2] for entry in found["journal"] if entry[0] == "val"]
    return {
        "losses": losses,
        "validated": validated,
        "weights": found["weights"],
        "gathered": layers is not None and layers.gathered,
    }


@pytest.mark.exact
@pytest.mark.parametrize(("strategy", "devices"), [("fsdp2:cp=2", 2), ("3d:pp=2,dp_shard=2", 4)])
def test_other_layouts_compute_as_without_it(pool: RankPool, tmp_path: Path, strategy: str, devices: int) -> None:
    """In fp32 the switch changes nothing but what travels, in training and in validation."""
    on, off = (pool.run(devices, fit, tmp_path / str(gather), strategy, devices, gather, 4) for gather in (True, False))
    assert [rank["gathered"] for rank in on] == [True] * devices
    assert not any(rank["gathered"] for rank in off)
    for got, want in zip(on, off):
        assert len(got["losses"]) == 4
        assert got["losses"] == want["losses"]
        assert got["validated"] == want["validated"]
        assert got["validated"]
        assert all(torch.equal(got["weights"][name], weight) for name, weight in want["weights"].items())


@pytest.mark.exact
def test_checkpoints_hold_plain_weights(pool: RankPool, tmp_path: Path) -> None:
    """transformers reads what was trained; a run goes on where it was, with the gather or without, on one rank too."""
    whole = pool.run(2, fit, tmp_path / "whole", "fsdp2", 2, True, 4)[0]
    half = pool.run(2, fit, tmp_path / "half", "fsdp2", 2, True, 2)[0]
    assert half["losses"] == pytest.approx(whole["losses"][:2], rel=1e-6)
    saved = tmp_path / "half" / "checkpoints" / "latest"
    read = AutoModelForCausalLM.from_pretrained(saved / "model").state_dict()
    assert all(torch.equal(read[name].float(), weight) for name, weight in half["weights"].items())
    for gather in (True, False):
        again = pool.run(2, fit, tmp_path / f"again-{gather}", "fsdp2", 2, gather, 4, saved)[0]
        assert again["losses"] == pytest.approx(whole["losses"][2:], rel=1e-6)
        assert all(relative_error(again["weights"][n], weight) < 1e-6 for n, weight in whole["weights"].items())
    alone = pool.run(1, fit, tmp_path / "alone", "auto", 1, "auto", 4, saved)[0]
    assert alone["losses"] == pytest.approx(
        whole["losses"][2:], rel=2e-3
    )  # micro-batches are cast apart from each other


def refused(spec: str, world_size: int) -> str:
    use("torchao")
    model = tiny_model("llama")
    convert_to_fp8(model, "tensorwise", CPU, emulate=True, all_gather=True)
    with pytest.raises(ValueError, match="kernels fp8_all_gather=true") as error:
        check_gathered(make_strategy(spec, world_size).parallelize(model))
    return str(error.value)


def test_layouts_that_cannot_refuse_it(pool: RankPool) -> None:
    assert "tp=2 cuts the weights" in pool.run(4, refused, "fsdp2:tp=2,dp_shard=2", 4)[0]
    assert "on the CPU" in pool.run(2, refused, "fsdp2:cpu_offload=true", 2)[0]
    assert "this layout does not" in pool.run(2, refused, "ddp", 2)[0]
    assert "this layout does not" in refused("fsdp2", 1)


def test_choices_that_cannot_refuse_it() -> None:
    with pytest.raises(ValueError, match=r"fp8_all_gather='yes' is unknown\. Allowed: true, false, auto"):
        KernelsConfig(fp8_all_gather="yes")  # type: ignore[arg-type]
    for fp8 in (None, "delayed"):
        with pytest.raises(ValueError, match="gathers the weights that torchao's fp8='tensorwise' casts"):
            KernelsConfig(fp8=fp8, fp8_all_gather=True)
    with pytest.raises(ValueError, match="fp8='rowwise': its weights have a scale for every row"):
        convert_to_fp8(tiny_model("llama"), "rowwise", CPU, emulate=True, all_gather=True)
    assert Fp8Layers("rowwise", ["a"]).gatherable == []
