"""Learning-rate schedules of optimizers whose groups or learning rates are changed during a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


class PlannedLR(LambdaLR):
    """The schedule of a `SchedulerConfig`."""


def follow_set_rates(scheduler: Any) -> None:
    """Let learning rates that somebody has set in the optimizer since the last step stay: the schedule scales them.

    LambdaLR would put its own in their place after one step. A rate on the GPU is not looked at.

    Args:
        scheduler: one that is not ours is left alone, and does what torch says.
    """
    if not isinstance(scheduler, PlannedLR):
        return
    for i, (group, last) in enumerate(zip(scheduler.optimizer.param_groups, scheduler.get_last_lr())):
        rate = group["lr"]
        if isinstance(rate, Tensor) and rate.device.type != "cpu":
            continue
        if float(rate) == float(last) or not (shape := scheduler.lr_lambdas[i](scheduler.last_epoch)):
            continue
        if not math.isclose(float(rate), float(scheduler.base_lrs[i]) * shape, rel_tol=1e-6):
            group["initial_lr"] = scheduler.base_lrs[i] = float(rate) / shape


def keep_set_rates(scheduler: Any, before: Sequence[float], after: Sequence[float]) -> None:
    """Go on with the rates that `follow_set_rates` and `rescale` have made before a resume.

    A group that is given another rate now begins with that one.

    Args:
        scheduler: one that is not ours is left alone.
        before: the peak rate of each group when the run that is resumed began.
        after: when it was saved.
    """
    if not isinstance(scheduler, PlannedLR):
        return
    for i, (group, was, came) in enumerate(zip(scheduler.optimizer.param_groups, before, after)):
        if float(scheduler.base_lrs[i]) == float(was) != float(came):
            group["initial_lr"] = scheduler.base_lrs[i] = float(came)
            set_lr(group, float(came) * scheduler.lr_lambdas[i](scheduler.last_epoch))


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
