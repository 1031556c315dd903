"""A small training run whose every number is noted, for tests that stop and resume it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor

from automodel_trainer import CausalLMModule, MockDataModule, OptimizerConfig, Trainer
from tests.tiny import tiny_model, tiny_tokenizer

STEPS_PER_EPOCH, EPOCHS = 5, 2
ADAM = OptimizerConfig(args={"eps": 1e-3})  # far above the rounding of a gradient, which other layouts have otherwise


class Journal(Callback):
    """What happened, in order: ("train", step, epoch, loss, lr) and ("val", step, loss, a random number)."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        loss, lr = float(trainer.callback_metrics["train_loss"]), trainer.optimizers[0].param_groups[0]["lr"]
        self.entries.append(("train", trainer.global_step, trainer.current_epoch, loss, lr))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A callback that draws in validation (sampled answers) moves the generator for the steps that follow.
        drawn = float(torch.rand(()))
        self.entries.append(("val", trainer.global_step, float(trainer.callback_metrics["val_loss"]), drawn))


def train(
    root: Path,
    callbacks: Sequence[Callback] = (),
    *,
    strategy: Any = "auto",
    devices: int = 1,
    scheduler: str = "cosine",
    attention_dropout: float = 0.3,
    ckpt_path: str | Path | None = None,
    module: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train with dropout, accumulation, clipping and a schedule; returns the journal, the weights and the trainer."""
    pl.seed_everything(7)
    journal = Journal()
    model = tiny_model(attention_dropout=attention_dropout)
    rows = {"num_samples": 8 * STEPS_PER_EPOCH, "val_samples": 4}
    data = MockDataModule(264, seq_len=16, micro_batch_size=2, global_batch_size=8, **rows)
    defaults = {"max_epochs": EPOCHS, "val_check_interval": 3, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        callbacks=[journal, *callbacks],
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_ledger=False,
        enable_throughput=False,
        **{**defaults, **options},
    )
    trainer.fit(
        CausalLMModule(
            model, tokenizer=tiny_tokenizer(), lr=1e-2, scheduler=scheduler, optimizer=ADAM, **(module or {})
        ),
        data,
        ckpt_path=ckpt_path,
    )
    weights = {name: whole(value) for name, value in trainer.lightning_module.state_dict().items()}
    return {"journal": journal.entries, "weights": weights, "trainer": trainer}


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def written() -> None:
    """Wait for saves in the background to be over."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(300)
