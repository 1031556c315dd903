"""How ranks tell each other where they are while their collectives hang: a key-value store of their own on rank 0."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_VERDICT = "verdict"
_CONNECTING, _ANSWERING = timedelta(seconds=60), timedelta(seconds=10)


class SideChannel:
    """A TCPStore beside the process groups. Every method may raise (`LOST`) once rank 0 is gone.

    Args:
        rank, world_size: this rank, and how many there are.
        host: an address of rank 0's machine.
        port: where rank 0's store listens; None on rank 0, which picks one.
    """

    LOST = (RuntimeError, OSError, ValueError)

    def __init__(self, rank: int, world_size: int, host: str, port: int | None) -> None:
        self.rank, self.world_size = rank, world_size
        self._store = dist.TCPStore(
            host, port or 0, is_master=port is None, timeout=_CONNECTING, wait_for_workers=False
        )
        self._store.set_timeout(_ANSWERING)
        self.port = self._store.port

    def tell(self, key: str, value: Any = True) -> None:
        """Leave a value for the others under `key` and this rank."""
        self._store.set(f"{key}/{self.rank}", json.dumps(value))

    def told(self, key: str) -> dict[int, Any]:
        """What ranks have left under `key`."""
        names = {rank: f"{key}/{rank}" for rank in range(self.world_size)}
        if self._store.check(list(names.values())):
            return {rank: json.loads(value) for rank, value in zip(names, self._store.multi_get(list(names.values())))}
        return {rank: json.loads(self._store.get(name)) for rank, name in names.items() if self._store.check([name])}

    def has_told(self, key: str, rank: int) -> bool:
        """Whether one rank has left something under `key`."""
        return self._store.check([f"{key}/{rank}"])

    def wait_for(self, key: str, ranks: set[int], timeout: float) -> None:
        """Wait until `ranks` have left something under `key`, or the time is up."""
        end = time.monotonic() + timeout
        while not ranks <= self.told(key).keys() and time.monotonic() < end:
            time.sleep(0.05)

    def declare(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """End the job, by `verdict` or by one that another rank has declared before."""
        return json.loads(self._store.compare_set(_VERDICT, "", json.dumps(verdict)))

    def verdict(self) -> dict[str, Any] | None:
        """What some rank has declared, if any has."""
        return json.loads(self._store.get(_VERDICT)) if self._store.check([_VERDICT]) else None
