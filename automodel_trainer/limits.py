"""Limits of a run that a Trainer is given: how long it is, and what a step may be."""

from __future__ import annotations

from typing import Any

from automodel_trainer.modules.optim import check_clip

DEFAULT_EPOCHS = 3  # if neither epochs, steps nor time are given; Hugging Face's Trainer has the same default


def check_step(gradient_clip_val: float | None, accumulate_grad_batches: int) -> None:
    """Check the options of a step.

    Raises:
        ValueError: the norm is negative, or there is no micro-batch.
    """
    check_clip(gradient_clip_val)
    if accumulate_grad_batches < 1:
        raise ValueError(f"accumulate_grad_batches={accumulate_grad_batches} must be at least 1.")


def upper_limit(
    max_epochs: int | None, max_steps: int, min_epochs: int | None, min_steps: int | None, max_time: Any
) -> int | None:
    """`max_epochs`, or the default where neither epochs, steps nor time are limited.

    Raises:
        ValueError: the lower limits lie above the upper ones.
    """
    for unit, low, high in (("epochs", min_epochs, max_epochs), ("steps", min_steps, max_steps)):
        if low is not None and high is not None and -1 < high < low:
            raise ValueError(f"min_{unit}={low} is more than max_{unit}={high}. Raise max_{unit} or lower min_{unit}.")
    if max_epochs is not None or max_steps != -1:
        return max_epochs
    return -1 if max_time is not None else max(DEFAULT_EPOCHS, min_epochs or 0)
