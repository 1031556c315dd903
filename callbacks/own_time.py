"""The share of time that this rank computes and does not wait for other ranks, by looking at its stack now and then.

Every rank waits for the slowest in each collective, so all steps take equally long. What differs is how much of a step
a rank spends outside of collectives. A thread looks twenty times a second where the training thread is. It costs the
training thread nothing, works for every layout, and compares no clocks of machines.
"""

from __future__ import annotations

import threading
import time

from automodel_trainer.callbacks.stacks import frame_of, in_backward, waits_for_ranks

INTERVAL = 0.05  # seconds between two looks
_BUSY = 0.3  # share of CPU time below which a backward does not compute


class OwnTime:
    """Looks at the thread that makes it, until `stop`.

    In a backward, collectives that C++ code waits for (DDP's) have no line in Python. There a thread that uses no CPU
    counts as waiting. On a GPU the host runs ahead of the device, and this is the host's time.

    Attributes:
        counting: whether looks count. Switch it off while something other than training goes on.
    """

    def __init__(self) -> None:
        self.counting = False
        self._thread_id = threading.get_ident()
        self._clock = _cpu_clock(self._thread_id)
        self._waited = self._looks = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="own-time", daemon=True)
        self._thread.start()

    def take(self) -> tuple[int, int]:
        """How often this rank was seen waiting for others, and how often it was looked at, since the last call."""
        found = self._waited, self._looks
        self._waited = self._looks = 0
        return found

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        then, used = time.monotonic(), self._used()
        while not self._over.wait(INTERVAL):
            before, used_before = then, used
            then, used = time.monotonic(), self._used()
            frame = frame_of(self._thread_id)
            if not self.counting or frame is None:
                continue
            idle = used is not None and used_before is not None and used - used_before < _BUSY * (then - before)
            self._waited += waits_for_ranks(frame) or (idle and in_backward(frame))
            self._looks += 1

    def _used(self) -> float | None:
        return None if self._clock is None else time.clock_gettime(self._clock)


def _cpu_clock(thread_id: int) -> int | None:
    """The clock of a thread's CPU time, where the system has one."""
    return time.pthread_getcpuclockid(thread_id) if hasattr(time, "pthread_getcpuclockid") else None
