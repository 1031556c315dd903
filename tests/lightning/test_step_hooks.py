"""Hooks around a step of an objective: which are called, the loss they find, and what tuners make of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner

from automodel_trainer import CausalLMModule, MockDataModule, Trainer
from automodel_trainer.callbacks import Throughput
from automodel_trainer.modules.step_hooks import StepHooks
from tests.lightning import boring
from tests.lightning.boring import WHOLE_EPOCHS
from tests.pool import RankPool
from tests.tiny import tiny_model


def make(root: Path | str, *callbacks: Callback, **options: Any) -> Trainer:
    options = {"enable_checkpointing": False, "log_every_n_steps": 1, **WHOLE_EPOCHS, **options}
    return boring.make(root, callbacks=list(callbacks), **options)


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


def test_who_has_hooks() -> None:
    class Own(CausalLMModule):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...

    class Backward(CausalLMModule):
        def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None: ...

    class Before(Callback):
        def on_before_backward(self, *_: Any) -> None: ...

    hooks = StepHooks(CausalLMModule(tiny_model()))
    assert not hooks([ModelCheckpoint(), Throughput()])
    assert hooks([ModelCheckpoint(), Throughput(), Losses()]) == {"on_train_batch_end"}
    before, other = ModelCheckpoint(), Losses()
    assert not hooks([before])
    assert hooks([other]) == {"on_train_batch_end"}, "as many callbacks, but another one"
    assert hooks([LambdaCallback(on_before_zero_grad=lambda *_: None)]) == {"on_before_zero_grad"}
    assert not hooks([])
    assert StepHooks(Own(tiny_model()))([]) == {"on_train_batch_end"}
    with pytest.raises(ValueError, match=r"Backward overrides backward, which would never be called"):
        Backward(tiny_model())
    with pytest.warns(UserWarning, match=r"on_before_backward of Before is not called"):
        assert not hooks([Before()])


class Hooked(CausalLMModule):
    """Clips, steps and schedules by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[str] = []
        self.norms: list[float] = []

    def note(self, name: str) -> None:
        self.calls.append(name)
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        assert grads, name

    def on_after_backward(self) -> None:
        self.note("after backward")

    def configure_gradient_clipping(self, optimizer: Any, value: Any = None, algorithm: Any = None) -> None:
        self.note("clip")
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)
        self.norms.append(float(self.strategy.clip_grad_norm_(self.model.parameters(), None)))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.note("step")
        optimizer.step(closure=optimizer_closure)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.note("schedule")
        scheduler.step()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.note("before zero")

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.note("zero")
        optimizer.zero_grad()


def hooked(root: str, strategy: str) -> tuple[list[str], float, list[float]]:
    module = Hooked(tiny_model(), lr=1e-2)
    trainer = make(root, strategy=strategy, devices="auto", max_steps=3)
    trainer.fit(module, data(32))
    assert trainer.global_step == 3
    return module.calls, float(trainer.callback_metrics["train_loss"]), module.norms


def test_hooks_of_a_subclass(pool: RankPool, tmp_path: Path) -> None:
    """They are called once a step, and train as the module does without them."""
    plain = CausalLMModule(tiny_model(), lr=1e-2, gradient_clip_val=0.1)
    trainer = make(tmp_path, max_steps=3)
    trainer.fit(plain, data(32))
    found = [hooked(str(tmp_path), "ddp")]
    for strategy in ("fsdp2", "3d:pp=2"):
        found += pool.run(2, hooked, str(tmp_path), strategy)
    for calls, loss, norms in found:
        assert calls == ["after backward", "clip", "step", "schedule", "before zero", "zero"] * 3
        assert loss == pytest.approx(float(trainer.callback_metrics["train_loss"]), rel=1e-5)
        assert norms == pytest.approx([0.1] * 3, rel=1e-3)


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


class Doubles(CausalLMModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        found = super().training_step(batch, batch_idx)
        self.log("doubled", 2 * found["loss"])
        return found


def test_a_step_of_a_subclass_gets_the_loss_and_the_end_of_an_epoch_its_mean(tmp_path: Path) -> None:
    """Steps after the last log step count for callbacks that look at `train_loss` when an epoch ends."""
    seen: list[float] = []
    steps = LambdaCallback(on_train_batch_end=lambda trainer, module, outputs, *_: seen.append(float(outputs["loss"])))
    ends = EarlyStopping("train_loss", patience=5, check_on_train_epoch_end=True)
    trainer = make(tmp_path, steps, ends, log_every_n_steps=3, limit_val_batches=0)
    trainer.fit(Doubles(tiny_model(), lr=1e-2), MockDataModule(264, seq_len=16, global_batch_size=2, num_samples=10))
    assert len(seen) == 5
    assert float(trainer.callback_metrics["doubled"]) == pytest.approx(2 * seen[-1])
    assert float(ends.best_score) == pytest.approx(sum(seen[3:]) / 2, rel=1e-5)
    short = make(tmp_path, EarlyStopping("train_loss"), log_every_n_steps=10, limit_val_batches=0)
    short.fit(CausalLMModule(tiny_model()), MockDataModule(264, seq_len=16, global_batch_size=2, num_samples=4))
    assert short.callback_metrics["train_loss"] > 0
