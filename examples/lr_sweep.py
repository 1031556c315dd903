"""A sweep of the learning rate with Ray Tune: python examples/lr_sweep.py org/name chats.jsonl [steps [trials]].

It needs `pip install 'automodel-trainer[ray]'`. Every trial is a process of its own with one GPU, if there are any.
"""

import os
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from automodel_trainer import CausalLMModule, ChatDataModule, Trainer


class Report(pl.Callback):
    """Tells Tune every validation loss, so that it can stop a bad trial."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the loss at this step."""
        if not trainer.sanity_checking:
            tune.report({"val_loss": float(trainer.callback_metrics["val_loss"]), "step": trainer.global_step})


def trial(config: dict[str, Any], model: str, chats: str, steps: int) -> None:
    """Train with one learning rate."""
    data = ChatDataModule(chats, val_split=0.1, seq_len=256, global_batch_size=4)
    trainer = Trainer(
        max_steps=steps,
        val_check_interval=max(1, steps // 4),
        default_root_dir="run",  # Tune gives every trial a folder
        enable_checkpointing=False,
        callbacks=[Report()],
    )
    trainer.fit(CausalLMModule(model, lr=config["lr"]), data)


if __name__ == "__main__":
    model, chats, *numbers = sys.argv[1:]
    steps, trials = [*map(int, numbers), *(100, 8)[len(numbers) :]]
    model = os.path.abspath(model) if os.path.exists(model) else model
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trial, model=model, chats=os.path.abspath(chats), steps=steps),
            {"cpu": 1, "gpu": min(1, torch.cuda.device_count())},
        ),
        param_space={"lr": tune.loguniform(1e-6, 1e-3)},
        tune_config=tune.TuneConfig(
            metric="val_loss", mode="min", num_samples=trials, scheduler=ASHAScheduler("step", max_t=steps + 1)
        ),
    )
    best = tuner.fit().get_best_result()
    print(f"best: lr {best.config['lr']:.1e}, val_loss {best.metrics['val_loss']:.3f}")
