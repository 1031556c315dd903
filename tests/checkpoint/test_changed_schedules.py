"""Schedules of other people that were changed: the step keeps its number, and the rate is the new schedule's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from automodel_trainer.checkpoint.given import (
    continued_schedule,
    given_options,
    given_schedule,
    kept_options,
    note_given,
)
from automodel_trainer.checkpoint.option_groups import options_of_groups

SCHEDULES: dict[str, list[Any]] = {
    "cosine": [lambda o: CosineAnnealingLR(o, 20), lambda o: CosineAnnealingLR(o, 40, eta_min=1e-4)],
    "step": [lambda o: StepLR(o, 3), lambda o: StepLR(o, 2, gamma=0.5)],
    "exponential": [lambda o: ExponentialLR(o, 0.9), lambda o: StepLR(o, 5)],
    "one cycle": [lambda o: OneCycleLR(o, 0.1, total_steps=30), lambda o: OneCycleLR(o, 0.2, total_steps=60)],
    "lambda": [lambda o: LambdaLR(o, lambda n: 1 / (n + 1)), lambda o: LambdaLR(o, lambda n: 2 / (n + 2))],
    "in turn": [
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=4), ExponentialLR(o, 0.9)], [4]),
        lambda o: SequentialLR(o, [LinearLR(o, 0.2, total_iters=3), ExponentialLR(o, 0.8)], [3]),
    ],
}


def built(make: Any, lr: float) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=lr)
    scheduler = make(optimizer)
    note_given([optimizer], [scheduler])
    return optimizer, scheduler


@pytest.mark.filterwarnings("ignore:Detected call of", "ignore:.*deprecated")
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_changed_schedule_stands_where_it_would_stand(name: str) -> None:
    """Against the changed schedule of torch, stepped from the start; and unchanged, against the one that went on."""
    done, more = 6, 8
    for make, lr in ((SCHEDULES[name][0], 0.01), (SCHEDULES[name][0], 0.003), (SCHEDULES[name][1], 0.01)):
        optimizer, scheduler = built(SCHEDULES[name][0], 0.01)
        for _ in range(done):
            scheduler.step()
        saved = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        same_class = type(make(torch.optim.SGD([torch.zeros(1)], 1.0))) is type(scheduler)
        state = scheduler.state_dict() if same_class else {"last_epoch": done}
        then, schedule_then = given_options(optimizer), given_schedule(scheduler) if same_class else {}
        reference, expected = built(make, lr)
        for _ in range(done):
            expected.step()
        resumed, mine = built(make, lr)
        resumed.param_groups[0].update(kept_options(saved, then[0], given_options(resumed)[0]))  # type: ignore[index]
        mine.load_state_dict(continued_schedule(mine, state, schedule_then, resumed, then))
        for _ in range(more):
            assert resumed.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"], rel=1e-12)
            assert resumed.param_groups[0]["betas"] == pytest.approx(reference.param_groups[0]["betas"])
            expected.step()
            mine.step()


def test_a_plateau_keeps_what_it_has_seen() -> None:
    optimizer, scheduler = built(lambda o: ReduceLROnPlateau(o, patience=1, factor=0.1), 0.01)
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    saved = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    then, state = given_options(optimizer), scheduler.state_dict()
    resumed, mine = built(lambda o: ReduceLROnPlateau(o, patience=4, factor=0.1), 0.02)
    resumed.param_groups[0].update(kept_options(saved, then[0], given_options(resumed)[0]))  # type: ignore[index]
    mine.load_state_dict(continued_schedule(mine, state, given_schedule(scheduler), resumed, then))
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.002)
    assert mine.best == 1.0
    assert mine.patience == 4


def test_groups_of_other_parameters_have_what_theirs_had() -> None:
    """A plateau's lowered rate goes on where all parameters of a group had it; otherwise it is refused."""
    saved = [
        {"parameters": {"a", "b"}, "options": {"lr": 0.001, "weight_decay": 0.1}},
        {"parameters": {"c"}, "options": {"lr": 0.01, "weight_decay": 0.1}},
    ]
    given = [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.1, "weight_decay": 0.1}]
    mixed, own = options_of_groups([{"parameters": ["a", "c"]}, {"parameters": ["b"]}], saved, given)
    assert mixed.saved == mixed.then == {"weight_decay": 0.1}
    assert (own.saved, own.then) == (saved[0]["options"], given[0])
    optimizer, scheduler = built(lambda o: ReduceLROnPlateau(o, patience=4), 0.02)
    state = {**scheduler.state_dict(), "_last_lr": [0.001, 0.01]}
    for found, rate in ((own, 0.002), (mixed, None)):
        rates, then = [found.saved.get("lr")], [found.then or {}]
        if rate is None:
            with pytest.raises(ValueError, match=r"ReduceLROnPlateau has lowered .* one group now"):
                continued_schedule(scheduler, state, given_schedule(scheduler), optimizer, then, rates)
        else:
            continued_schedule(scheduler, state, given_schedule(scheduler), optimizer, then, rates)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
