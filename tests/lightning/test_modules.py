"""Modules and callbacks that Lightning documents, with this project's default callbacks on."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, Timer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from automodel_trainer import CausalLMModule, LoRAConfig, OptimizerConfig
from automodel_trainer.callbacks import DCPCheckpoint
from tests.harness import random_rows, stack
from tests.lightning.boring import loader, make, weight
from tests.processes import call
from tests.tiny import tiny_model


class NoOptimizer(BoringModel):
    def configure_optimizers(self) -> Any:
        return None


class Pulls(BoringModel):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return {"loss": self.layer(batch).sum()}


class Closure(BoringModel):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)["loss"]


def test_modules_of_every_kind(tmp_path: Path) -> None:
    options = {"limit_val_batches": 0, "enable_progress_bar": True, "log_every_n_steps": 1, "limit_train_batches": 4}
    for module in (NoOptimizer(), Pulls(), Closure()):
        trainer = make(tmp_path / type(module).__name__, **options)
        trainer.fit(module)
        assert trainer.fit_loop.total_batch_idx + 1 == 4, module
        make(tmp_path).test(type(module)(), ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False)  # type: ignore


@pytest.mark.exact
def test_lbfgs_goes_on(tmp_path: Path) -> None:
    """Its history is a list of tensors, and must survive."""
    rows = [torch.full((1, 32), 0.1 * step) for step in range(4)]

    def run(root: Path, until: int, path: Any = None) -> tuple[Any, torch.Tensor]:
        torch.manual_seed(0)
        trainer = make(root, max_epochs=until, limit_train_batches=4, limit_val_batches=0)
        trainer.fit(module := Closure(), rows, ckpt_path=path)
        return trainer, weight(module)

    _, whole = run(tmp_path / "whole", 3)
    first, _ = run(tmp_path / "first", 1)
    rest, parts = run(tmp_path / "rest", 3, first.checkpoint_callback.last_model_path)
    assert rest.global_step == 12
    assert torch.equal(whole, parts)


def test_callbacks_of_lightning(tmp_path: Path) -> None:
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
    trainer = make(tmp_path / "a", max_epochs=2, limit_train_batches=4, limit_val_batches=0, callbacks=[scheduler])
    trainer.fit(BoringModel())
    assert trainer.global_step == 4 + 2
    timer = Timer(timedelta(seconds=0))
    trainer = make(tmp_path / "b", max_epochs=50, callbacks=[timer, ModelCheckpoint(dirpath=tmp_path / "b")])
    trainer.fit(BoringModel())
    assert trainer.current_epoch < 50
    for profiler in ("simple", "advanced"):
        trainer = make(tmp_path / profiler, profiler=profiler, limit_val_batches=0)
        trainer.fit(BoringModel())
        summary = trainer.profiler.summary()
        assert "TrainingEpochLoop].train_dataloader_next" in summary or profiler == "advanced", summary
        assert "Quiet" not in summary


def batches(count: int, seed: int, token: int | None = None) -> DataLoader:
    made = [stack(random_rows(2, 16, seed=seed + i)) for i in range(count)]
    for batch in made:
        if token is not None:
            batch["input_ids"] = torch.full_like(batch["input_ids"], token)
            batch["labels"] = batch["input_ids"].clone()
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def test_several_validation_loaders(tmp_path: Path) -> None:
    """Each one's loss is what it is alone; `val_loss` is that of all tokens."""
    model = tiny_model()

    def losses(given: Any) -> dict[str, float]:
        trainer = make(tmp_path, limit_val_batches=1.0, limit_test_batches=1.0)
        trainer.validate(CausalLMModule(model), given, verbose=False)
        return {key: float(value) for key, value in trainer.callback_metrics.items() if "loss" in key}

    first, second = batches(2, 0), batches(1, 9, token=7)
    one, other = (losses(given)["val_loss"] for given in (first, second))
    by_number, by_name = losses([first, second]), losses({"chats": first, "code": second})
    assert set(by_number) == {"val_loss", "val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"}
    assert set(by_name) == {"val_loss", "val_loss/chats", "val_loss/code"}
    assert by_name["val_loss/chats"] == by_number["val_loss/dataloader_idx_0"] == pytest.approx(one)
    assert by_name["val_loss/code"] == by_number["val_loss/dataloader_idx_1"] == pytest.approx(other)
    tokens = [sum(int((b["labels"][:, 1:] != -100).sum()) for b in given) for given in (first, second)]
    pooled = (one * tokens[0] + other * tokens[1]) / sum(tokens)
    assert by_name["val_loss"] == pytest.approx(pooled, rel=1e-5)
    trainer = make(tmp_path, limit_val_batches=1.0)
    trainer.fit(CausalLMModule(model), batches(1, 3), {"chats": first, "code": second})
    assert "val_loss/code" in trainer.callback_metrics


def test_mappings_are_configs() -> None:
    """What YAML takes as a mapping is taken as a dict in Python, with the same checks."""
    module = CausalLMModule(
        tiny_model(),
        lora={"rank": 4},
        optimizer={"weight_decay": 0.5},
        scheduler={"name": "linear"},
        kernels={"loss": "whole"},
    )
    assert module.lora == LoRAConfig(rank=4)
    assert module.optimizer_config == OptimizerConfig(weight_decay=0.5)
    assert module.kernels.loss == "whole"
    for arguments, message in (
        ({"lora": {"rnak": 4}}, r"lora: 'rnak' is not an option of LoRAConfig. Did you mean 'rank'\?"),
        ({"lora": 16}, r"lora=16 is a int. Allowed: LoRAConfig\(…\), or a dict"),
        ({"kernels": {"los": "whole"}}, r"Did you mean 'loss'"),
        ({"scheduler": {"warmup": 3}}, r"'warmup' is not an option of SchedulerConfig"),
        ({"lora": {"rank": -1}}, r"rank"),
    ):
        with pytest.raises(ValueError, match=message):
            CausalLMModule(tiny_model(), **arguments)  # type: ignore[arg-type]


class Monitored(BoringModel):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("x", self.layer(batch).sum().bfloat16())


def forked(root: Path) -> None:
    for kind in (DCPCheckpoint, ModelCheckpoint):
        saves: Any = kind(monitor="x", dirpath=root / kind.__name__)
        trainer = make(root, strategy="ddp_fork", devices=2, callbacks=[saves])
        trainer.fit(module := Monitored(), loader(8), rows := loader(2))
        assert Path(saves.best_model_path).is_dir()
        assert torch.equal(weight(Monitored.load_from_checkpoint(saves.best_model_path)), weight(module))
        assert saves.best_model_score == trainer.callback_metrics["x"]
        [scores] = trainer.validate(dataloaders=rows, verbose=False)
        assert scores["x"] == saves.best_model_score


def test_ddp_fork_tells_the_parent(tmp_path: Path) -> None:
    """The checkpoint, its score, and the weights of a module that every process holds whole.

    In a process of its own: one that has run other tests has threads, which a fork loses while they hold locks.
    """
    call(tmp_path, forked, tmp_path)


class Stateless(torch.optim.lr_scheduler.LRScheduler):
    """A schedule that keeps no state, as Lightning allows one."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.epochs = optimizer, []

    def step(self, epoch: Any = None) -> None:
        self.epochs.append(epoch)

    def state_dict(self) -> Any:
        return None

    def load_state_dict(self, state_dict: Any) -> None:
        pass


def test_a_schedule_without_state(tmp_path: Path) -> None:
    class Module(BoringModel):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step(epoch=self.current_epoch)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.schedule = Stateless(optimizer)
            return [optimizer], [self.schedule]

    make(tmp_path).fit(Module())
    make(tmp_path, max_epochs=3).fit(module := Module(), ckpt_path="last")
    assert module.schedule.epochs == [1, 2]
