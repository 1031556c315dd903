"""Where this rank is, for whoever asks when it no longer moves: kept on the host, changed a few times a step.

Strategies and modules say what begins (`at("forward")`); it costs two assignments and a look at the clock (~0.2 µs),
never a look at the device. `callbacks.Watchdog` reads it from a thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Place:
    """The step (from 1; 0 before), the phase (data, forward, backward, clip, optimizer, save, …), and since when."""

    __slots__ = ("phase", "since", "step")

    def __init__(self) -> None:
        self.step, self.phase, self.since = 0, "start", time.monotonic()


here = Place()


def at(phase: str, step: int | None = None) -> None:
    """This rank begins `phase`, perhaps of another step."""
    if step is not None:
        here.step = step
    here.phase = phase
    here.since = time.monotonic()


@contextmanager
def during(phase: str) -> Iterator[None]:
    """`phase`, and then what was before it; where it fails, it stays."""
    before = here.phase
    at(phase)
    yield
    at(before)
