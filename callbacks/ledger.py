"""Ledger: what is trained, in which dtypes, on which devices: said once after the first step. Surprises are errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from automodel_trainer.callbacks.console import block, show
from automodel_trainer.callbacks.layout import max_over_ranks, trained_model
from automodel_trainer.callbacks.ledger_facts import (
    Facts,
    gradient_facts,
    low_precision_state,
    model_facts,
    optimizer_facts,
    run_facts,
)
from automodel_trainer.callbacks.ledger_text import ledger_rows, shortened
from automodel_trainer.strategies import Objective

HALF_PRECISION = ("bf16-true", "16-true")  # where optimizer state in half precision is what was asked for
SURPRISES = ("no_grad", "not_optimized", "low_precision_state", "untied")


class Ledger(Callback):
    """Prints what a run consists of after its first optimizer step, and writes it to `<default_root_dir>/ledger.json`.

    Four things are errors on all ranks, unless allowed:

    * `no_grad`: a trainable parameter got no gradient (in a user's own LightningModule only a line of the ledger);
    * `not_optimized`: a trainable parameter is in no optimizer (likewise);
    * `low_precision_state`: the optimizer keeps its state in bf16 or fp16, and `precision` did not ask for it;
    * `untied`: two weights that the model's config says are one, are not.

    The data is kept in `facts` after the first step.

    Args:
        allow: names of the surprises to let pass, for example `["no_grad"]`.
    """

    def __init__(self, allow: Sequence[str] = ()) -> None:
        unknown = [name for name in allow if name not in SURPRISES]
        if unknown or isinstance(allow, str):
            raise ValueError(f"Ledger(allow={allow!r}): give a list of names. Allowed: {', '.join(SURPRISES)}.")
        self.allow = tuple(allow)
        self.facts: Facts = {}
        self._gradients: Facts | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.facts, self._gradients = {}, None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._gradients is None:
            self._gradients = gradient_facts(trainer, trained_model(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.facts or self._gradients is None:
            return
        model = trained_model(trainer)
        self.facts = {
            "model": model_facts(trainer, model),
            "gradients": self._gradients,
            "optimizer": optimizer_facts(trainer, pl_module, model),
            "run": run_facts(trainer, batch),
        }
        surprises = self._surprises(trainer, pl_module)
        show(trainer, block("ledger", ledger_rows(self.facts)))
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            path = Path(trainer.default_root_dir) / "ledger.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n")
        self._raise_together(trainer, surprises)

    def _surprises(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, str]:
        """What is wrong on this rank, by the name of its switch."""
        missing, untied = self.facts["gradients"]["missing"], self.facts["model"]["untied"]
        left_out = self.facts["optimizer"]["left_out"]
        low = low_precision_state(trainer.optimizers)
        found = {}
        if missing and isinstance(pl_module, Objective):
            found["no_grad"] = (
                f"{len(missing)} trainable parameter(s) got no gradient in the first step: {shortened(missing, 5)}. "
                "They would stay as they are while counting as trained. Freeze them (requires_grad_(False)) if that is "
                "meant, or see why the forward does not use them"
            )
        if left_out and isinstance(pl_module, Objective):
            found["not_optimized"] = (
                f"{len(left_out)} trainable parameter(s) are in no optimizer: {shortened(left_out, 5)}. They would "
                "stay as they are while counting as trained. Freeze them (requires_grad_(False)) if that is meant, or "
                "give them to the optimizer"
            )
        if low and trainer.precision not in HALF_PRECISION:
            found["low_precision_state"] = (
                f"The optimizer keeps its state in {', '.join(low)} although precision={trainer.precision!r}: small "
                "updates get lost in it. Give the optimizer fp32 parameters (precision='bf16' computes in bf16 from "
                "fp32 weights), or ask for it with precision='bf16-true'"
            )
        if untied:
            found["untied"] = (
                f"Weights that the model's config says are one are not: {shortened(untied, 5)}. They would be trained "
                "apart, and one of them lost in the exported model. Call model.tie_weights() before training, or set "
                "tie_word_embeddings=False in the config"
            )
        return found

    def _raise_together(self, trainer: pl.Trainer, surprises: dict[str, str]) -> None:
        """Raise on every rank if any has a surprise: a rank that went on alone would wait for the others forever."""
        mine = torch.tensor([name in surprises for name in SURPRISES], dtype=torch.int32)
        flags = max_over_ranks(trainer, mine.to(trainer.strategy.root_device)).tolist()
        found = [name for name, flag in zip(SURPRISES, flags) if flag and name not in self.allow]
        if found:
            texts = [
                f"{surprises.get(name, f'Another rank reports {name!r}')} (Ledger(allow=[{name!r}]) lets it pass)."
                for name in found
            ]
            raise ValueError("\n".join(texts))
