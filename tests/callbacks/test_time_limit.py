"""A limit that leaves room to save, with a clock of the test's own."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from automodel_trainer.callbacks.time_limit import TimeLimit, seconds


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steps_until_due(limit: TimeLimit, clock: Clock, step: float, save: float | None, looks: int = 1) -> int:
    for number in range(1, 10_000):
        clock.now += step
        if limit.is_due(save, looks):
            return number
    raise AssertionError("never due")


@pytest.mark.parametrize("duration", ["00:01:00:00", timedelta(hours=1), {"minutes": 60}], ids=str)
def test_durations_are_lightning_s(duration: Any) -> None:
    assert seconds(duration) == pytest.approx(3600)


@pytest.mark.parametrize("duration", ["1h", {"fortnights": 1}, 5], ids=str)
def test_what_is_no_duration_is_refused(duration: Any) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        seconds(duration)


def test_a_save_and_a_step_fit_into_what_is_left() -> None:
    clock = Clock()
    limit = TimeLimit({"seconds": 1000}, clock=clock)
    steps = steps_until_due(limit, clock, step=10, save=40)
    # 1.5 x the longest save and one more step: due when 70 s are left, and not a step before
    assert steps * 10 == 930
    # on several ranks the stop comes a step later
    limit.start()
    assert steps_until_due(limit, clock, step=10, save=40, looks=2) * 10 == 920


def test_before_the_first_save_a_share_of_the_limit_is_kept() -> None:
    clock = Clock()
    assert steps_until_due(TimeLimit({"seconds": 1000}, clock=clock), clock, 10, None) * 10 == 940  # 5 % and a step
    assert steps_until_due(TimeLimit({"hours": 10}, clock=clock), clock, 10, None) * 10 == 36_000 - 300 - 10


def test_the_longest_time_between_looks_counts() -> None:
    """A validation of 100 s lies between two looks; the next one has to fit, too."""
    clock = Clock()
    limit = TimeLimit({"seconds": 1000}, clock=clock)
    for step in (10, 100, 10):
        clock.now += step
        assert not limit.is_due(40)
    assert 120 + steps_until_due(limit, clock, 10, 40) * 10 == 840


def test_a_given_reserve_is_kept_as_it_is() -> None:
    clock = Clock()
    assert steps_until_due(TimeLimit({"seconds": 1000}, {"seconds": 500}, clock), clock, 10, 400) * 10 == 500
    with pytest.raises(ValueError, match="no step would be taken"):
        TimeLimit({"seconds": 10}, {"seconds": 10})
