"""What this rank is doing right now: its step and its phase, kept on the host.

Strategies and modules announce each phase (`enter_phase("forward")`). That costs two assignments and one clock read
(about 0.2 µs) and never waits for the device. `callbacks.Watchdog` reads it from a thread when a rank stops moving.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phase:
    """The step (from 1; 0 before the first), the phase (data, forward, backward, clip, …), and when it began."""

    __slots__ = ("phase", "since", "step")

    def __init__(self) -> None:
        self.step, self.phase, self.since = 0, "start", time.monotonic()


current = Phase()


def enter_phase(phase: str, step: int | None = None) -> None:
    """This rank begins `phase`, of `step` where a new one begins."""
    if step is not None:
        current.step = step
    current.phase = phase
    current.since = time.monotonic()


@contextmanager
def during_phase(phase: str) -> Iterator[None]:
    """Be in `phase`, then in the phase before. After an exception the phase stays, so that it can be reported."""
    before = current.phase
    enter_phase(phase)
    yield
    enter_phase(before)
