"""When to stop so that a save still fits into the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from lightning.pytorch.callbacks import Timer

Duration = str | timedelta | dict[str, int]
_FIRST_GUESS = 0.05  # of the limit, for a save that has not been measured yet; at most …
_LARGEST_GUESS = 300.0  # seconds
_SAFETY = 1.5  # on the longest save so far


class TimeLimit:
    """A limit in seconds of wall-clock time from `start` on, a reserve for the last save included.

    Looked at after every step (`is_due`). The reserve, unless it is given, is 1.5 × the longest save of the run so far
    (before the first: 5 % of the limit, at most 5 minutes), and the longest time between two looks, because what
    comes up short now is next looked at one step (perhaps a validation, perhaps a save) later.

    Args:
        limit: as Lightning's `Timer` takes it: "DD:HH:MM:SS", a timedelta, or its keywords as a dict.
        reserve: likewise; None measures.

    Raises:
        ValueError: not a duration, or a reserve as long as the limit.
    """

    def __init__(self, limit: Duration, reserve: Duration | None = None, clock: Callable[[], float] = time.monotonic):
        self.limit = seconds(limit)
        self.reserve = None if reserve is None else seconds(reserve)
        if self.reserve is not None and self.reserve >= self.limit:
            raise ValueError(f"reserve={reserve!r} is as long as max_time={limit!r}: no step would be taken.")
        self._clock = clock
        self.start()

    def start(self) -> None:
        """Count from now."""
        self._started = self._clock()
        self._looked: float | None = None
        self._gaps: list[float] = []  # the longest and the last time between two looks

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def is_due(self, longest_save: float | None, looks: int = 1) -> bool:
        """Whether to stop after this step; to be called once a step.

        Args:
            longest_save: seconds that the longest save of this run took; None before the first.
            looks: how many looks later the stop comes into effect.
        """
        now = self._clock()
        if self._looked is not None:
            gap = now - self._looked
            self._gaps = [max(gap, *self._gaps[:1]) if self._gaps else gap, gap]
        self._looked = now
        return self.elapsed + self._needed(longest_save, looks) >= self.limit

    def _needed(self, longest_save: float | None, looks: int) -> float:
        """Seconds to keep: for the save, and for the steps until the next look takes effect."""
        if self.reserve is not None:
            return self.reserve
        save = min(_FIRST_GUESS * self.limit, _LARGEST_GUESS) if longest_save is None else _SAFETY * longest_save
        longest, last = self._gaps or (0.0, 0.0)
        return save + longest + (looks - 1) * last


def seconds(duration: Duration) -> float:
    """Seconds of a duration as Lightning's `Timer` takes it.

    Raises:
        ValueError: it is none.
    """
    try:
        remaining = Timer(duration).time_remaining()
    except Exception as error:  # of Lightning's own kind, or TypeError of timedelta
        raise ValueError(
            f"max_time={duration!r} is not a duration: give 'DD:HH:MM:SS', a timedelta, or a dict like {{'hours': 4}}."
        ) from error
    assert remaining is not None
    return remaining
