"""Schedules and saves of an objective, whose step is manual to Lightning: by step, epoch, metric and time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint, StochasticWeightAveraging
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from automodel_trainer import CausalLMModule, MockDataModule
from automodel_trainer.callbacks import DCPCheckpoint
from tests.lightning.boring import WHOLE_EPOCHS, make
from tests.tiny import tiny_model

STEPS = 4  # of an epoch
LR = 1e-2


class Rates(Callback):
    """Keeps the learning rate of each step."""

    def __init__(self, group: int = 0) -> None:
        self.seen: list[float] = []
        self.group = group

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[self.group]["lr"])


def rates(
    root: Path,
    configure: Callable[[Any], Any] | None,
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    **options: Any,
) -> list[float]:
    class Scheduled(CausalLMModule):
        def configure_optimizers(self) -> Any:
            return configure(AdamW(self.parameters(), lr=LR)) if configure else super().configure_optimizers()

    kept = Rates()
    trainer = make(root, callbacks=[*callbacks, kept], **{"max_epochs": 3, **WHOLE_EPOCHS, **options})
    module = Scheduled(tiny_model(), lr=LR, scheduler="constant")
    trainer.fit(
        module,
        MockDataModule(264, seq_len=16, global_batch_size=4, num_samples=4 * STEPS, val_samples=2),
        ckpt_path=ckpt_path,
    )
    return kept.seen


def halved(optimizer: Any, **options: Any) -> dict[str, Any]:
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1, 0.5), **options}}


def plateau(optimizer: Any) -> dict[str, Any]:
    """No loss is ten times as large as the best, so the rate falls after every epoch but the first."""
    scheduler = ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0, threshold=10.0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


@pytest.mark.parametrize(
    ("configure", "halvings"),
    [
        (lambda optimizer: ([optimizer], [StepLR(optimizer, 1, 0.5)]), [0, 1, 2]),
        (lambda optimizer: halved(optimizer, interval="epoch", frequency=2), [0, 0, 1]),
        (lambda optimizer: halved(optimizer, interval="step"), range(12)),
        (lambda optimizer: halved(optimizer, interval="step", frequency=2), [i // 2 for i in range(12)]),
        (plateau, [0, 0, 1]),
        (lambda optimizer: optimizer, [0]),
    ],
)
def test_a_schedule_of_a_subclass(tmp_path: Path, configure: Callable[[Any], Any], halvings: Any) -> None:
    """Lightning's rules hold: by default a schedule moves once an epoch."""
    found = rates(tmp_path, configure, enable_checkpointing=False)
    repeated = [LR / 2**i for i in halvings for _ in range(12 // len(halvings))]
    assert found == pytest.approx(repeated)


def test_averaging_anneals_by_the_epoch(tmp_path: Path) -> None:
    averaging = StochasticWeightAveraging(
        swa_lrs=1.0, swa_epoch_start=2, annealing_epochs=2, annealing_strategy="linear"
    )
    found = rates(tmp_path, None, averaging, max_epochs=5, enable_checkpointing=False)
    by_epoch = [found[i : i + STEPS] for i in range(0, len(found), STEPS)]
    assert all(len(set(epoch)) == 1 for epoch in by_epoch)
    assert by_epoch[-1][0] == pytest.approx(1.0)


@pytest.mark.parametrize("when", [{"train_time_interval": timedelta(0)}, {"every_n_train_steps": 1}])
def test_lightnings_checkpoints_by_time_and_step(tmp_path: Path, when: dict[str, Any]) -> None:
    saves = ModelCheckpoint(dirpath=tmp_path / "saved", save_top_k=-1, filename="{step}", **when)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*manual optimization")
        rates(tmp_path, None, saves, max_epochs=1)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [f"step={i}.ckpt" for i in range(1, 5)]


def test_a_rate_that_is_set_before_the_run_is_the_rate(tmp_path: Path) -> None:
    """It is not taken for one that was found later, also where a subclass builds the optimizer."""

    class Own(CausalLMModule):
        def configure_optimizers(self) -> Any:
            return halved(AdamW(self.parameters(), lr=self.lr), interval="step")

    for kind in (Own, CausalLMModule):
        kept = Rates()
        module = kind(tiny_model(), lr=LR, scheduler="constant")
        for lr in (LR / 10, LR / 100):
            kept.seen.clear()
            module.lr = lr
            trainer = make(tmp_path, callbacks=[kept], enable_checkpointing=False, limit_val_batches=0)
            trainer.fit(module, MockDataModule(264, seq_len=16, global_batch_size=4, num_samples=8))
            assert kept.seen == pytest.approx([lr, lr / 2 if kind is Own else lr])


class SetsRate(Callback):
    """Sets the rate once, in the optimizer."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.optimizers[0].param_groups[0]["lr"] = LR / 4


def test_a_rate_that_a_callback_sets_stays(tmp_path: Path) -> None:
    """The schedule goes on from it, also in a run that is resumed."""
    wanted = [LR, LR, *[LR / 4] * 6]
    saves = DCPCheckpoint(dirpath=tmp_path / "saved", keep_last=5)
    assert rates(tmp_path, None, SetsRate(), saves, max_epochs=2, limit_val_batches=0) == pytest.approx(wanted)
    first = min((tmp_path / "saved").iterdir(), key=lambda path: path.stat().st_mtime)
    resumed = rates(tmp_path, None, max_epochs=2, limit_val_batches=0, ckpt_path=first)
    assert resumed == pytest.approx(wanted[STEPS:])


def test_finetuning_of_a_backbone_sets_its_rate(tmp_path: Path) -> None:
    class Backbone(CausalLMModule):
        @property
        def backbone(self) -> Any:
            return self.model.model

    module = Backbone(tiny_model(), lr=LR, scheduler="constant")
    finetuning = BackboneFinetuning(1, lambda epoch: 2.0, backbone_initial_ratio_lr=0.1, should_align=False)
    kept = Rates(group=-1)
    trainer = make(
        tmp_path, callbacks=[finetuning, kept], max_epochs=4, limit_val_batches=0, enable_checkpointing=False
    )
    trainer.fit(module, MockDataModule(264, seq_len=16, global_batch_size=4, num_samples=8))
    assert kept.seen == pytest.approx([LR, LR, *[LR / 10] * 2, *[LR / 5] * 2, *[LR / 2.5] * 2])
