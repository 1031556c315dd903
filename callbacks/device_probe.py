"""How fast this rank's GPU is: the time of a fixed piece of work. One that is hot or broken takes longer."""

from __future__ import annotations

import time

import torch

SIZE, TIMES = 2048, 16  # of square bf16 matrices (24 MiB), and how often they are multiplied: about 0.5 ms
TRIES = 3
EVERY = 30.0  # seconds between two measurements


class DeviceProbe:
    """Multiplies matrices now and then. Of ranks that train in step, no step's time shows whose device is slow.

    Args:
        device: of this rank. On a CPU nothing is measured: there the host's own time shows it.
        size: of the matrices.
    """

    def __init__(self, device: torch.device, size: int = SIZE) -> None:
        self._device, self._size = device, size
        self._last, self._measured_at = 0.0, -EVERY

    def seconds(self) -> float:
        """The latest measurement; 0 on a CPU. Call it where the device has nothing to do: it waits for it."""
        if self._device.type == "cuda" and time.monotonic() - self._measured_at >= EVERY:
            self._last, self._measured_at = self.measure(), time.monotonic()
        return self._last

    def measure(self) -> float:
        """Seconds of the work, the shortest of some tries: what else the host does makes some take longer."""
        matrix = torch.zeros(self._size, self._size, dtype=torch.bfloat16, device=self._device)
        out = torch.empty_like(matrix)
        return min(self._timed(matrix, out) for _ in range(TRIES))

    def _timed(self, matrix: torch.Tensor, out: torch.Tensor) -> float:
        self._synchronize()
        begin = time.perf_counter()
        for _ in range(TIMES):
            torch.mm(matrix, matrix, out=out)
        self._synchronize()
        return time.perf_counter() - begin

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
