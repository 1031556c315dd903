"""Which rank is slower than the others, said once for each time that it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median_low

FAR, NEAR = 1.5, 1.25  # times the median: a straggler begins above the first, and ends below the second
HOLD = 20.0  # seconds that it must be far, without a break, before it is named
FLOOR = 0.02  # seconds a step: a smaller difference matters to nobody
COST = 0.1  # share of a step that the others wait for a straggler; a smaller one has another reason


def ratios(values: Sequence[float]) -> list[float]:
    """Every value as a multiple of the median (the lower of two middle ones: of two ranks one is slow)."""
    middle = median_low(values)
    return [value / middle if middle > 0 else 1.0 for value in values]


class Stragglers:
    """Compares the seconds that ranks need themselves; one that is slow for a while is named once.

    Args:
        floor: smaller differences from the median do not count, in seconds.
        now: a clock of this process, in seconds.
    """

    def __init__(self, floor: float = FLOOR, now: Callable[[], float] = time.monotonic) -> None:
        self._floor, self._now = floor, now
        self._far_since: dict[int, float] = {}
        self.named: set[int] = set()

    def judge(self, own: Sequence[float], step: float) -> list[int]:
        """Look at new measurements.

        Args:
            own: of each rank, seconds a step outside of collectives.
            step: seconds of a step.

        Returns:
            the ranks that are named now and were not before. `named` has all that still are.
        """
        found, middle = [], median_low(own)
        for rank, (value, ratio) in enumerate(zip(own, ratios(own))):
            if ratio < NEAR:
                self.named.discard(rank)
            if not (ratio > FAR and value - middle > self._floor and value - middle > COST * step):
                self._far_since.pop(rank, None)
            elif self._now() - self._far_since.setdefault(rank, self._now()) >= HOLD and rank not in self.named:
                self.named.add(rank)
                found.append(rank)
        return found
