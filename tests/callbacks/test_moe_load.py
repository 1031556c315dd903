"""MoELoad: the load of experts as metrics and as a picture, the same under every layout."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from automodel_trainer import CausalLMModule, MockDataModule, Trainer
from automodel_trainer.callbacks import MoELoad
from automodel_trainer.callbacks.moe_load import summary
from tests.pool import RankPool
from tests.routers import routed_model
from tests.strategies.test_tensor import MOE
from tests.tiny import tiny_model

LOADS = {"moe_max_load", "moe_mean_max_load", "moe_idle_experts", "moe_entropy", "moe_dropped_tokens"}
METRICS = LOADS | {"moe_z_loss"}


def test_summary() -> None:
    even, one = summary({"a": [1.0] * 4}), summary({"a": [4.0, 0, 0, 0], "b": [1.0] * 4})
    assert even == pytest.approx(dict.fromkeys(LOADS, 1.0) | {"moe_idle_experts": 0.0, "moe_dropped_tokens": 0.0})
    assert one["moe_max_load"] == 4.0
    assert one["moe_mean_max_load"] == 2.5
    assert one["moe_idle_experts"] == 3 / 8
    assert one["moe_entropy"] == pytest.approx(0.5)


class Batches(Callback):
    """Keeps the micro-batches of a run."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.seen += batch


def _count(total: Tensor, module: nn.Module, args: Any, output: Any) -> None:
    chosen = next(t for t in output if not t.is_floating_point())
    total += chosen.flatten().bincount(minlength=4)


def counted(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[dict[str, list[float]], float]:
    """The loads of one forward of each micro-batch, counted from what the routers choose; and the z-loss."""
    found: dict[str, Tensor] = {}
    squares: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            found[name] = torch.zeros(4)
            module.register_forward_hook(partial(_count, found[name]))
            module.register_forward_hook(lambda m, args, out: squares.append(out[0].logsumexp(-1) ** 2))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"])
    loads = {name.replace("gate", "experts"): (n / n.mean()).tolist() for name, n in found.items()}
    return loads, float(torch.cat(squares).mean())


def check_same(load: dict[str, list[float]], other: dict[str, list[float]]) -> None:
    assert list(load) == list(other)
    assert all(values == pytest.approx(other[name]) for name, values in load.items())


def run(root: Path, strategy: str, devices: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    load, batches = MoELoad(), Batches()
    model = routed_model("qwen3_moe", **{**MOE, "num_hidden_layers": 4})
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        max_steps=1,
        log_every_n_steps=1,
        default_root_dir=root,
        callbacks=[load, batches],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_ledger=False,
    )
    data = MockDataModule(vocab_size=264, seq_len=16, micro_batch_size=1, global_batch_size=4, num_samples=4)
    before = copy.deepcopy(model)
    trainer.fit(CausalLMModule(model, lr=1e-3), data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name in METRICS}
    if devices == 1:
        loads, z = counted(before, batches.seen)
        check_same(load.load, loads)
        assert metrics["moe_z_loss"] == pytest.approx(z)
    return load.load, metrics


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The load on one device, and a picture of it."""
    folder = tmp_path_factory.mktemp("alone")
    load, metrics = run(folder, "auto", 1)
    picture = next(folder.rglob("moe_load.svg")).read_text()
    assert len(re.findall("<title>", picture)) == 2 * 4
    return load, metrics


def test_metrics_on_one_device(alone: tuple[dict[str, list[float]], dict[str, float]]) -> None:
    load, metrics = alone
    assert list(load) == ["model.layers.1.mlp.experts", "model.layers.3.mlp.experts"]
    assert all(sum(values) == pytest.approx(4) for values in load.values())
    assert metrics == pytest.approx(summary(load) | {"moe_z_loss": metrics["moe_z_loss"]})


@pytest.mark.parametrize(
    ("strategy", "devices"),
    [
        ("fsdp2:ep=2,activation_checkpointing=full", 2),
        ("fsdp2:tp=2,compile=true,compile_backend=aot_eager", 2),
        ("3d:pp=2,ep=2", 4),
    ],
)
def test_the_same_under_every_layout(pool: RankPool, tmp_path: Path, alone: Any, strategy: str, devices: int) -> None:
    for load, metrics in pool.run(devices, run, tmp_path, strategy, devices):
        check_same(load, alone[0])
        assert metrics == pytest.approx(alone[1])


def test_no_z_loss_of_routers_that_return_probabilities(tmp_path: Path) -> None:
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    sizes = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 264}
    load = MoELoad(picture=False)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, default_root_dir=tmp_path, callbacks=[load], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_ledger=False, log_every_n_steps=1,
    )  # fmt: skip
    model = tiny_model("gemma4_text", **experts, **sizes)
    trainer.fit(CausalLMModule(model, lr=1e-3), MockDataModule(vocab_size=264, seq_len=8, num_samples=1))
    assert len(load.load) == 2
    assert "moe_entropy" in trainer.callback_metrics
    assert "moe_z_loss" not in trainer.callback_metrics


def test_a_model_without_experts_is_told(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, default_root_dir=tmp_path, callbacks=[MoELoad()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_ledger=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="MoELoad finds no experts in LlamaForCausalLM"):
        trainer.fit(CausalLMModule(tiny_model(), lr=1e-3), MockDataModule(vocab_size=264, seq_len=8, num_samples=1))
