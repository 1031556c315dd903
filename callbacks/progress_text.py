"""The texts of the progress line and of the summary at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from automodel_trainer.callbacks.console import Row

_LOSSES = ("train_loss", "loss", "train/loss")  # names that modules use for their training loss


def training_loss(logged: Mapping[str, Any]) -> float | None:
    """The training loss among all logged metrics, or None. Waits for the device."""
    return next((float(logged[name]) for name in _LOSSES if name in logged), None)


def metric_texts(logged: Mapping[str, Any], for_the_bar: Mapping[str, Any], lr: float | None) -> list[str]:
    """Texts for loss, learning rate, and metrics that a module logs with `prog_bar=True`. Waits for the device.

    Args:
        logged: all logged metrics.
        for_the_bar: those with `prog_bar=True`.
        lr: the learning rate, used if the module does not log it as `lr`.
    """
    loss = training_loss(logged)
    lr = float(logged["lr"]) if "lr" in logged else lr
    texts = [f"loss {loss:.3f}"] if loss is not None else []
    texts += [f"lr {lr:.1e}".replace("e-0", "e-")] if lr is not None else []
    others = {name: value for name, value in for_the_bar.items() if name not in (*_LOSSES, "lr")}
    return texts + [f"{name} {float(value):.4g}" for name, value in others.items()]


def throughput_texts(values: Mapping[str, float]) -> list[str]:
    """Short texts for the values in `Throughput.last`."""
    formats = (
        ("tokens_per_second", "{:,.0f} tok/s"),
        ("samples_per_second", "{:,.1f} samples/s"),
        ("supervised_share", "sup {:.0%}"),
        ("peak_memory_gib", "mem {:.1f} GiB"),
        ("mfu", "mfu {:.0%}"),
    )
    texts = [text.format(values[name]) for name, text in formats if name in values]
    wait = values.get("data_wait", 0.0)
    return texts + ([f"data wait {wait:.0%}"] if wait > 0.05 else [])  # shown only if it costs time


def fitted(parts: Sequence[str], width: int | None = None) -> str:
    """Join the parts to one line. If it is too long, drop parts from the end, but keep the first and the last one.

    Args:
        parts: texts; empty ones are left out.
        width: maximum width in columns. None: no limit.
    """
    first, *middle, last = parts if len(parts) > 1 else [*parts, ""]
    while True:
        line = "  ".join(part for part in (first, *middle, last) if part)
        if width is None or len(line) <= width or not middle:
            return line
        middle.pop()


def evaluation_line(metrics: Mapping[str, Any], prefix: str) -> str:
    """Metrics as text, for example `loss 2.43, perplexity 11.4, token accuracy 52%`.

    Args:
        metrics: the logged metrics.
        prefix: take metrics with this prefix ("val_").

    Returns:
        The text; empty if no metric has the prefix.
    """
    formats = {"loss": "loss {:.3f}", "perplexity": "perplexity {:.1f}", "token_accuracy": "token accuracy {:.0%}"}
    known = [text.format(float(metrics[prefix + name])) for name, text in formats.items() if prefix + name in metrics]
    others = [name for name in metrics if name.startswith(prefix) and name.removeprefix(prefix) not in formats]
    return ", ".join(known + [f"{name.removeprefix(prefix)} {float(metrics[name]):.4g}" for name in others])


def closing_rows(
    *,
    steps: int,
    planned: int | None,
    seconds: float,
    tokens: int,
    validation_losses: Sequence[float],
    checkpoint: str,
) -> list[Row]:
    """The lines of the summary at the end of a run.

    Args:
        steps: optimizer steps done.
        planned: optimizer steps planned, if known.
        seconds: duration of the training.
        tokens: tokens trained on; 0 if they are not counted.
        validation_losses: losses of all validations, in order.
        checkpoint: the last checkpoint, or "".
    """
    rows = [("steps", f"{steps:,}" + (f" of {planned:,}" if planned else "") + f" in {duration(seconds)}")]
    if tokens:
        rows.append(("tokens", f"{tokens:,} ({tokens / max(seconds, 1e-9):,.0f} per second, everything included)"))
    if validation_losses:
        rows.append(("validation loss", loss_change(validation_losses)))
    if checkpoint:
        rows.append(("checkpoint", checkpoint))
    return rows


def loss_change(losses: Sequence[float]) -> str:
    """The first and last loss and the relative change, for example `4.03 → 2.43 (−40%)`."""
    first, last = losses[0], losses[-1]
    if len(losses) == 1:
        return f"{last:.2f}"
    percent = round(100 * (last - first) / first) if first and math.isfinite(last - first) else 0
    return f"{first:.2f} → {last:.2f}" + (f" ({percent:+d}%)".replace("-", "−") if percent else "")


def duration(seconds: float) -> str:
    """Seconds as `0:34`, `12:05` or `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
