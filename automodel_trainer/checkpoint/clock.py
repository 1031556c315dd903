"""When a checkpoint was written, such that the newest has the latest time, whatever the clocks of machines say.

Rank 0 stamps checkpoints, and after a loss of its node it may be on a machine whose clock is an hour behind. Its new
checkpoints would count as older than those that it resumed from: they would be removed first and never be resumed.
"""

from __future__ import annotations

import math
import time

_STEP = 0.001  # seconds


class _Clock:
    latest = 0.0


_clock = _Clock()


def note(created: float) -> None:
    """Note the time of a checkpoint that exists: later ones are to be later. Reading a manifest does so."""
    if math.isfinite(created):
        _clock.latest = max(_clock.latest, created)


def stamp() -> float:
    """The time for a new checkpoint, in seconds: now, or a little after the latest one that this process knows of."""
    note(max(time.time(), _clock.latest + _STEP))
    return _clock.latest
