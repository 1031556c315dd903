"""Draw the same random numbers once more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomStates:
    """The states of the random generators as they are now: the host's, and that of `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._other = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """A context in which the generators draw what they drew after these states."""
        if self._other is None:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._host)
                yield
            return
        with torch.random.fork_rng(devices=[self._device], device_type=self._device.type):
            torch.set_rng_state(self._host)
            torch.get_device_module(self._device).set_rng_state(self._other, self._device)
            yield
