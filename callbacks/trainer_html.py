"""A Trainer as HTML, for notebooks: how it would train, and what it has trained. All text is escaped."""

from __future__ import annotations

import lightning.pytorch as pl

from automodel_trainer.callbacks.console import Row
from automodel_trainer.callbacks.ledger import Ledger
from automodel_trainer.nn.chart import short
from automodel_trainer.nn.html_table import html_table


def trainer_html(trainer: pl.Trainer) -> str:
    """Layout, precision, length, metrics and checkpoint as a table, and below it the ledger of the last run."""
    ledgers = [callback for callback in trainer.callbacks if isinstance(callback, Ledger) and callback.facts]  # type: ignore[attr-defined]
    below = "".join(f"<details><summary>ledger</summary>{ledger._repr_html_()}</details>" for ledger in ledgers)
    return html_table(type(trainer).__name__, trainer_rows(trainer)) + below


def trainer_rows(trainer: pl.Trainer) -> list[Row]:
    """Names and texts of what is known of a Trainer, in reading order."""
    devices = f"{trainer.num_nodes} × " * (trainer.num_nodes > 1) + f"{trainer.num_devices} × {_device(trainer)}"
    rows = [
        ("layout", f"{type(trainer.strategy).__name__} on {devices}, precision {trainer.precision}"),
        ("length", _length(trainer)),
        ("folder", str(trainer.default_root_dir)),
    ]
    if trainer.state.fn is None:
        return [*rows, ("state", "has not run yet")]
    rows.append(("state", f"{trainer.state.fn.value}: {trainer.state.status.value}, step {trainer.global_step:,}"))
    if trainer.callback_metrics:
        metrics = (f"{name} {short(float(value))}" for name, value in trainer.callback_metrics.items())
        rows.append(("metrics", ", ".join(metrics)))
    if saved := getattr(trainer.checkpoint_callback, "last_model_path", ""):
        rows.append(("checkpoint", str(saved)))
    return rows


def _device(trainer: pl.Trainer) -> str:
    return type(trainer.accelerator).__name__.removesuffix("Accelerator")


def _length(trainer: pl.Trainer) -> str:
    limits = [f"{trainer.max_steps:,} steps"] if trainer.max_steps not in (-1, None) else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(f"{trainer.max_epochs:,} epoch{'s' * (trainer.max_epochs != 1)}")
    return "at most " + " and ".join(limits) if limits else "no limit of steps or epochs"
