"""Ledger: after the first step, print what is trained, in which dtypes, on which devices. Surprises are errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import Optimizer

from automodel_trainer.callbacks.block_memory import BlockMemory
from automodel_trainer.callbacks.console import show_block
from automodel_trainer.callbacks.first_batch import first_row
from automodel_trainer.callbacks.layout import max_over_ranks, trained_model
from automodel_trainer.callbacks.ledger_facts import (
    Facts,
    gradient_facts,
    low_precision_state,
    model_facts,
    optimizer_facts,
    run_facts,
)
from automodel_trainer.callbacks.ledger_text import ledger_rows
from automodel_trainer.checkpoint.remote import local_root
from automodel_trainer.models.lora import adapters
from automodel_trainer.nn.html_table import html_table
from automodel_trainer.nn.text import listed
from automodel_trainer.strategies import Objective

HALF_PRECISION = ("bf16-true", "16-true")  # these ask for optimizer state in half precision
SURPRISES = ("no_grad", "not_optimized", "low_precision_state", "untied")


class Ledger(Callback):
    """Prints a summary of the run after its first optimizer step, and writes it to `<default_root_dir>/ledger.json`.

    Four surprises are errors on all ranks, unless allowed:

    * `no_grad`: a trainable parameter got no gradient (in a user's own LightningModule this is only shown);
    * `not_optimized`: a trainable parameter is in no optimizer (in a user's own LightningModule this is only shown);
    * `low_precision_state`: the optimizer keeps its state in bf16 or fp16, and `precision` did not ask for it;
    * `untied`: the model's config ties two weights, but they are separate parameters.

    Args:
        allow: names of the surprises to allow, for example `["no_grad"]`.

    The file also has the text of the first row with what of it is trained (`amt watch` shows it).

    Attributes:
        facts: the content of the ledger, after the first step.

    Raises:
        ValueError: `allow` has an unknown name; after the first step, a surprise that is not allowed.
    """

    tells_changes = True  # of a resumed run; see `ContinueRun`

    def __init__(self, allow: Sequence[str] = ()) -> None:
        unknown = [name for name in allow if name not in SURPRISES]
        if unknown or isinstance(allow, str):
            raise ValueError(f"Ledger(allow={allow!r}): give a list of names. Allowed: {', '.join(SURPRISES)}.")
        self.allow = tuple(allow)
        self.facts: Facts = {}
        self._gradients: Facts | None = None
        self._memory: BlockMemory | None = None
        self._bytes_per_block: int | None = None

    def _repr_html_(self) -> str:
        """The ledger in a notebook."""
        return html_table("ledger", ledger_rows(self.facts) if self.facts else [("", "no step has been made yet")])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the facts of an earlier run."""
        self.facts, self._gradients, self._memory = {}, None, None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Watch the first forward."""
        if self._memory is None:
            self._memory = BlockMemory(trained_model(trainer), trainer.strategy.root_device)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at the gradients of the first step: later the optimizer clears them."""
        if self._gradients is None:
            self._gradients = gradient_facts(trainer, trained_model(trainer))
            self._bytes_per_block = self._memory.stop() if self._memory else None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the facts after the first optimizer step, print them, and raise on surprises.

        Raises:
            ValueError: a surprise that is not allowed. Raised on all ranks.
        """
        if self.facts or self._gradients is None:
            return
        model = trained_model(trainer)
        self.facts = {
            "model": model_facts(trainer, model),
            "gradients": self._gradients,
            "optimizer": optimizer_facts(trainer, pl_module, model),
            "run": {**run_facts(trainer, batch), "bytes_per_block": self._bytes_per_block},
            "first_row": first_row(pl_module, batch) if trainer.is_global_zero else None,
        }
        surprises = self._surprises(trainer, pl_module)
        show_block(trainer, "ledger", ledger_rows(self.facts))
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            path = local_root(trainer.default_root_dir) / "ledger.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n")
        self._raise_together(trainer, surprises)

    def _surprises(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, ValueError]:
        """The surprises on this rank by their names."""
        missing, untied = self.facts["gradients"]["missing"], self.facts["model"]["untied"]
        left_out = self.facts["optimizer"]["left_out"]
        low = low_precision_state(trainer.optimizers)
        found = {}
        if missing and isinstance(pl_module, Objective):
            found["no_grad"] = ValueError(
                f"{len(missing)} trainable parameter(s) got no gradient in the first step: {listed(missing, 5)}. They "
                f"would never change. {_without_gradient(trained_model(trainer), missing)}"
            )
        if left_out and isinstance(pl_module, Objective):
            found["not_optimized"] = ValueError(
                f"{len(left_out)} trainable parameter(s) are in no optimizer: {listed(left_out, 5)}. They would never "
                "change. Freeze them (requires_grad_(False)) if that is intended, or pass them to the optimizer"
            )
        if low and trainer.precision not in HALF_PRECISION:
            found["low_precision_state"] = ValueError(
                f"The optimizer keeps its state in {', '.join(low)}, but precision={trainer.precision!r}. Small "
                "updates get lost in such state. Give the optimizer fp32 parameters (precision='bf16' computes in bf16 "
                "from fp32 weights), or ask for it with precision='bf16-true'"
            )
        if untied:
            found["untied"] = ValueError(
                f"The model's config ties these weights, but they are separate parameters: {listed(untied, 5)}. They "
                "would be trained separately, and the exported model would have only one of them. Call "
                "model.tie_weights() before training, or set tie_word_embeddings=False in the config"
            )
        return found

    def _raise_together(self, trainer: pl.Trainer, surprises: dict[str, ValueError]) -> None:
        """Raise on every rank if any rank has a surprise. Otherwise the other ranks would wait for it forever."""
        mine = torch.tensor([name in surprises for name in SURPRISES], dtype=torch.int32)
        flags = max_over_ranks(trainer, mine.to(trainer.strategy.root_device)).tolist()
        found = [name for name, flag in zip(SURPRISES, flags) if flag and name not in self.allow]
        if found:
            texts = [
                f"{surprises.get(name, f'Another rank reports {name!r}')} (Ledger(allow=[{name!r}]) allows it)."
                for name in found
            ]
            raise ValueError("\n".join(texts))


def _without_gradient(model: nn.Module, missing: Sequence[str]) -> str:
    """What to do about these parameters."""
    targets = [adapter.target for adapter in adapters(model) if f"{adapter.prefix}lora_A.weight" in missing]
    if targets and all(".lora_" in name for name in missing):
        layers = sorted({".".join(target.split(".")[-2:]) for target in targets})
        return (
            "The model reads the weights of these layers without calling them, or computes them without gradients, or "
            f"not for this data, so their adapters do nothing. Leave them out: lora exclude={layers}"
        )
    return "Freeze them (requires_grad_(False)) if that is intended, or find out why the forward does not use them"
