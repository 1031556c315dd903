"""Learning-rate schedules of optimizers whose groups change."""

from __future__ import annotations

from typing import Any

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
