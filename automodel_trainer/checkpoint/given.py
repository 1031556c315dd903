"""What a run's optimizers and schedules were given when they were built, before a checkpoint or a step changed them.

A checkpoint keeps it beside the present values. So a resumed run can tell what its user changed (its new value counts)
from what training changed (the checkpoint's value counts).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from automodel_trainer.nn.schedule import PlannedLR, follow_new_groups, keep_set_rates, set_lr

Options = dict[str, Any]
_OPTIONS: WeakKeyDictionary[Optimizer, list[Options]] = WeakKeyDictionary()
_SCHEDULES: WeakKeyDictionary[Any, Options] = WeakKeyDictionary()


def note_given(optimizers: Sequence[Optimizer], schedulers: Sequence[Any] = ()) -> None:
    """Note what optimizers and schedules were given. To be called when both are built, and before they are restored."""
    for optimizer in optimizers:
        _OPTIONS[optimizer] = [_options(group) for group in optimizer.param_groups]
    for scheduler in schedulers:
        _SCHEDULES[scheduler] = _copied(scheduler.state_dict() or {})


def given_options(optimizer: Optimizer) -> list[Options] | None:
    """The options of each parameter group as they were given; None if nobody noted them."""
    return _OPTIONS.get(optimizer)


def given_schedule(scheduler: Any) -> Options:
    """The state of a schedule as it was built; empty if nobody noted it."""
    return _SCHEDULES.get(scheduler, {})


def kept_options(saved: Options, then: Options | None, now: Options | None) -> Options:
    """The options of a parameter group that go on with their value in a checkpoint.

    Args:
        saved: the values in the checkpoint.
        then: what the run that wrote it was given; None if that is not known.
        now: what this run was given; None: take all of `saved`.
    """
    if now is None:
        return saved
    if then is None:  # an older checkpoint: only the schedule's own starting point is known
        then = {**saved, "lr": saved.get("initial_lr", saved.get("lr"))}
        now = {**now, "lr": now.get("initial_lr", now.get("lr"))}
    return {key: value for key, value in saved.items() if key not in now or same(now[key], then.get(key, value))}


def continued_schedule(
    scheduler: Any,
    saved: Options,
    then: Options,
    optimizer: Optimizer,
    given_then: Sequence[Options] | None,
    rates: Sequence[float | None] | None = None,
) -> Options:
    """The state that a schedule goes on with, and in its optimizer the learning rate of the next step.

    A schedule that was given the same settings, on an optimizer that was given the same, goes on with its saved state.
    One that was given others stands where it would stand had the run been under them from its first step. A
    `ReduceLROnPlateau` depends on what it has seen: it keeps that, and its learning rate is scaled.

    Args:
        scheduler: the schedule as built for this run.
        saved: its state in the checkpoint.
        then: its state when the run that wrote the checkpoint built it; empty if that was another schedule, or is not
            known. Of another schedule, `saved` holds only the number of steps, as `last_epoch`.
        optimizer: its optimizer, with its state restored.
        given_then: the options that the optimizer of that run was given, by group; None if not known.
        rates: the learning rate that each group had in the checkpoint; None for a group whose parameters had several.
            Without it the schedule's own record is taken.

    Raises:
        ValueError: the learning rates of a `ReduceLROnPlateau` cannot be told.
    """
    now, options = given_schedule(scheduler), given_options(optimizer) or []
    changed = [key for key in saved if key in now and not (then and same(now[key], then.get(key, now[key])))]
    if isinstance(scheduler, ReduceLROnPlateau):
        changed_to = {key: now[key] for key in changed}
        return _continued_plateau(saved, changed_to, optimizer, given_then, options, rates or saved.get("_last_lr"))
    unchanged = bool(then) and not changed and given_then is not None and same([*given_then], options)
    # The state of a LambdaLR does not show its function, so it is always asked again.
    if "last_epoch" not in saved or (unchanged and not isinstance(scheduler, LambdaLR)):
        return saved
    for group, given in zip(optimizer.param_groups, options):
        set_lr(group, given["lr"])
    steps = int(saved["last_epoch"])
    follow_new_groups(scheduler)
    keep_set_rates(scheduler, then.get("base_lrs", ()), saved.get("base_lrs", ()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for optimizer.step() first
        if type(scheduler) in (LambdaLR, PlannedLR) and steps:  # its learning rate depends on the last step alone
            scheduler.last_epoch, steps = steps - 1, 1
        for _ in range(steps):
            scheduler.step()
    counted = {"_step_count": saved["_step_count"]} if "_step_count" in saved else {}
    return {**(scheduler.state_dict() or {}), **counted}


def _continued_plateau(
    saved: Options,
    changed: Options,
    optimizer: Optimizer,
    then: Sequence[Options] | None,
    now: Sequence[Options],
    rates: Sequence[float | None] | None,
) -> Options:
    for group, rate, before, after in zip(
        optimizer.param_groups, rates or [group["lr"] for group in optimizer.param_groups], then or now, now
    ):
        if rate is None or "lr" not in before:
            raise ValueError(
                "ReduceLROnPlateau has lowered learning rates of parameters that are one group now, so there is no one "
                "rate to go on with. Keep the groups of the checkpoint, use another schedule, or start a new run from "
                "the checkpoint's weights: fit(resume='weights'), --resume weights."
            )
        if not same(before["lr"], after["lr"]):
            set_lr(group, float(rate) * float(after["lr"]) / float(before["lr"]))
    seen = {"best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_step_count"}
    settings = {key: value for key, value in changed.items() if key not in seen}
    return {**saved, **settings, "_last_lr": [float(group["lr"]) for group in optimizer.param_groups]}


def _options(group: Mapping[str, Any]) -> Options:
    return _copied({key: value for key, value in group.items() if key not in ("params", "param_names")})


def _copied(values: Mapping[str, Any]) -> Options:
    """A copy that later steps do not change. Tensors among options hold one number, so they become that."""
    return {key: value.item() if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in values.items()}


def same(one: Any, other: Any) -> bool:
    """Whether two plain values are equal. Numbers of different types may be; tuples and lists too."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return torch.equal(torch.as_tensor(one, dtype=torch.float64), torch.as_tensor(other, dtype=torch.float64))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)
