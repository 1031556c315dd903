"""Decide when to stop, so that a save still fits into the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from lightning.pytorch.callbacks import Timer

Duration = str | timedelta | dict[str, int]
_FIRST_GUESS = 0.05  # share of the limit to reserve for a save before one was measured
_LARGEST_GUESS = 300.0  # seconds; upper bound of that reserve
_SAFETY = 1.5  # factor on the longest save so far


class TimeLimit:
    """A wall-clock limit from `start` on, which includes a reserve for the last save.

    `is_due` must be called after every step. Unless it is given, the reserve is 1.5 times the longest save of the run
    so far (before the first: 5 % of the limit, at most 5 minutes), plus the longest time between two calls. The latter
    is needed because the next call comes only after another step, and perhaps a validation or a save.

    Args:
        limit: a duration as for Lightning's `Timer`: "DD:HH:MM:SS", a timedelta, or the keywords of one as a dict.
        reserve: a duration, too. None: measure it.
        clock: returns the current time in seconds.

    Raises:
        ValueError: a duration is not valid, or the reserve is not shorter than the limit.
    """

    def __init__(self, limit: Duration, reserve: Duration | None = None, clock: Callable[[], float] = time.monotonic):
        self.limit = seconds(limit)
        self.reserve = None if reserve is None else seconds(reserve)
        if self.reserve is not None and self.reserve >= self.limit:
            raise ValueError(
                f"reserve={reserve!r} is not shorter than max_time={limit!r}: no step would be taken. Reserve less."
            )
        self._clock = clock
        self.start()

    def start(self) -> None:
        """Start the clock."""
        self._started = self._clock()
        self._looked: float | None = None
        self._gaps: list[float] = []  # the longest and the last time between two calls of `is_due`

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def is_due(self, longest_save: float | None, looks: int = 1) -> bool:
        """Whether to stop after this step. Call it once per step.

        Args:
            longest_save: duration of the longest save of this run in seconds; None before the first.
            looks: number of calls after which the stop takes effect.
        """
        now = self._clock()
        if self._looked is not None:
            gap = now - self._looked
            self._gaps = [max(gap, *self._gaps[:1]) if self._gaps else gap, gap]
        self._looked = now
        return self.elapsed + self._needed(longest_save, looks) >= self.limit

    def _needed(self, longest_save: float | None, looks: int) -> float:
        """Seconds to reserve: for the save, and for the steps until a stop at the next call takes effect."""
        if self.reserve is not None:
            return self.reserve
        save = min(_FIRST_GUESS * self.limit, _LARGEST_GUESS) if longest_save is None else _SAFETY * longest_save
        longest, last = self._gaps or (0.0, 0.0)
        return save + longest + (looks - 1) * last


def seconds(duration: Duration) -> float:
    """Convert a duration, as for Lightning's `Timer`, to seconds.

    Raises:
        ValueError: it is not a duration.
    """
    try:
        remaining = Timer(duration).time_remaining()
    except Exception as error:  # Lightning's own exception, or a TypeError from timedelta
        raise ValueError(
            f"max_time={duration!r} is not a duration: give 'DD:HH:MM:SS', a timedelta, or a dict like {{'hours': 4}}."
        ) from error
    assert remaining is not None
    return remaining
