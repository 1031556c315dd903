"""The loss that callbacks find in the outputs of a step, and what tuners make of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, LambdaCallback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner

from automodel_trainer import CausalLMModule, MockDataModule, Trainer
from automodel_trainer.callbacks import Throughput
from automodel_trainer.modules.step_outputs import LossWanted
from tests.pool import RankPool
from tests.tiny import tiny_model


def make(root: Path | str, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=str(root),
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
        **{"devices": 1, "max_epochs": 1, "log_every_n_steps": 1} | options,
    )


def data(rows: int = 160) -> MockDataModule:
    return MockDataModule(264, seq_len=16, micro_batch_size=1, global_batch_size=4, num_samples=rows)


class Losses(Callback):
    def __init__(self) -> None:
        self.given: list[float] = []
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.given.append(float(outputs["loss"]))
        self.logged.append(float(trainer.callback_metrics["train_loss"]))


def losses(root: str, strategy: str) -> list[float]:
    kept = Losses()
    make(root, kept, strategy=strategy, devices="auto").fit(CausalLMModule(tiny_model(), lr=1e-2), data(32))
    assert kept.given == pytest.approx(kept.logged, rel=1e-6)
    return kept.given


def test_the_loss_of_a_step_on_every_layout(pool: RankPool, tmp_path: Path) -> None:
    """That of the global batch, as it is logged, on all ranks."""
    one = losses(str(tmp_path), "ddp")
    assert len(one) == 8
    for strategy in ("ddp", "fsdp2", "fsdp2:cp=2", "fsdp2:tp=2", "3d:pp=2"):
        for found in pool.run(2, losses, str(tmp_path), strategy):
            assert found == pytest.approx(one, rel=1e-5), strategy


def test_who_may_look(tmp_path: Path) -> None:
    class Own(CausalLMModule):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...

    wanted = LossWanted(CausalLMModule(tiny_model()))
    assert not wanted([ModelCheckpoint(), Throughput()])
    assert wanted([ModelCheckpoint(), Throughput(), Losses()])
    assert not wanted([ModelCheckpoint()])
    assert wanted([LambdaCallback(on_train_batch_end=lambda *_: None), ModelCheckpoint()])
    assert LossWanted(Own(tiny_model()))([])


@pytest.mark.parametrize("as_callback", [True, False])
def test_a_learning_rate_is_found_and_trained_with(tmp_path: Path, as_callback: bool) -> None:
    finder = LearningRateFinder(num_training_steps=30, max_lr=1.0)
    seen: list[float] = []
    rate = LambdaCallback(
        on_train_batch_start=lambda trainer, *_: seen.append(trainer.optimizers[0].param_groups[0]["lr"])
    )
    trainer = make(tmp_path, rate, *([finder] if as_callback else []), max_steps=8)
    module = CausalLMModule(tiny_model(), lr=1e-5, scheduler={"name": "constant", "warmup_steps": 2})
    if not as_callback:
        found = Tuner(trainer).lr_find(module, datamodule=data(), num_training=30, max_lr=1.0)
        assert found is not None
        finder.optimal_lr = found
        seen.clear()
    trainer.fit(module, data())
    assert finder.optimal_lr is not None
    lr = finder.optimal_lr.suggestion()
    assert lr is not None
    assert module.lr == lr != 1e-5
    assert not any(map(math.isnan, finder.optimal_lr.results["loss"]))
    assert seen[-6:] == pytest.approx([lr] * 6), "the schedule goes on from the rate that was found"
