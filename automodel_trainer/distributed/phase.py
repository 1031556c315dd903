"""The current step and phase of this rank, kept on the host.

Strategies and modules announce each phase (`enter_phase("forward")`). This costs two assignments and one clock read
(about 0.2 µs) and never waits for the device. A thread of `callbacks.Watchdog` reads it when a rank hangs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phase:
    """The step (from 1; 0 before the first), the phase (data, forward, backward, clip, …), and when it began.

    Attributes:
        step: number of the optimizer step.
        phase: name of the phase.
        since: `time.monotonic()` at the beginning of the phase, in seconds.
    """

    __slots__ = ("phase", "since", "step")

    def __init__(self) -> None:
        self.step, self.phase, self.since = 0, "start", time.monotonic()


current = Phase()


def enter_phase(phase: str, step: int | None = None) -> None:
    """Record that this rank begins `phase`, and a new step if `step` is given."""
    if step is not None:
        current.step = step
    current.phase = phase
    current.since = time.monotonic()


@contextmanager
def during_phase(phase: str) -> Iterator[None]:
    """Enter `phase`, and go back to the phase before at the end. After an exception the phase stays, to be reported."""
    before = current.phase
    enter_phase(phase)
    yield  # no `finally`: see above
    enter_phase(before)


@contextmanager
def during_place(place: str) -> Iterator[None]:
    """Name a place inside the current phase: `forward (dispatch of tokens)`. It ends as `during_phase` does."""
    with during_phase(f"{current.phase.partition(' (')[0]} ({place})"):
        yield
