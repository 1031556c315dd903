"""Learning-rate schedules of optimizers whose groups or learning rates are changed during a run."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR


def follow_new_groups(scheduler: Any) -> None:
    """Let groups that a callback has added to the optimizer follow the schedule, from the learning rate of their own.

    Args:
        scheduler: one of another kind than LambdaLR is left alone.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    for group in scheduler.optimizer.param_groups[len(scheduler.base_lrs) :]:
        scheduler.base_lrs.append(group.setdefault("initial_lr", group["lr"]))
        scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])


def set_lr(group: dict[str, Any], rate: Any) -> None:
    """Set the learning rate of an optimizer's group, in place where it is a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(float(rate))
    else:
        group["lr"] = rate


def rescale(scheduler: Any, factor: float) -> None:
    """Multiply the learning rates that a schedule has and will give by `factor`.

    Args:
        scheduler: one of another kind than LambdaLR is left alone.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    scheduler.base_lrs = [lr * factor for lr in scheduler.base_lrs]
    for group, lr, shape in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
        group["initial_lr"] = lr
        set_lr(group, lr * shape(scheduler.last_epoch))
