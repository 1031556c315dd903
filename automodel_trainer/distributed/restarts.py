"""Tell a run that its launcher restarts (`torchrun --max-restarts`, Ray) which run folder to continue."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from automodel_trainer.distributed.rendezvous import outliving_store

_TIMEOUT = timedelta(seconds=60)


class _Process:
    """The number of fits that this process has begun.

    A script may call `fit` more than once. After a restart it calls them in the same order, so the number identifies
    a fit.
    """

    fits = 0


_process = _Process()


class Memory(Protocol):
    """What outlives a restart: the part of torch's `Store` that is used here."""

    def check(self, keys: list[str]) -> bool:
        """Whether there is a value for every key."""
        ...

    def get(self, key: str) -> bytes:
        """The value of a key."""
        ...

    def set(self, key: str, value: str) -> None:
        """Keep a value."""
        ...


_memory: Memory | None = None
_launcher = "torchrun"


def use(memory: Memory, launcher: str) -> None:
    """Remember in `memory`, not in torchrun's store. Another launcher calls it in every process, before `fit`."""
    global _memory, _launcher
    _memory, _launcher = memory, launcher


def launcher() -> str:
    """Who restarts this run, if anyone does."""
    return _launcher


def _outliving() -> Memory | None:
    return _memory or outliving_store(_TIMEOUT)


def forgets_runs() -> bool:
    """Whether torchrun has restarted this process and keeps no store in which its run could be found."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return restarted and _memory is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def begin_fit() -> Path | None:
    """Count a new fit. Every rank calls this when `fit` begins.

    Returns:
        The run folder that this fit had before the restart; None if there was none.
    """
    _process.fits += 1
    store = _outliving()
    key = f"automodel_trainer/fit-{_process.fits}"
    return Path(store.get(key).decode()) if store is not None and store.check([key]) else None


def remember(run: Path) -> None:
    """Note that the latest fit writes its checkpoints into the folder `run`. One rank calls this."""
    store = _outliving()
    if store is not None:
        store.set(f"automodel_trainer/fit-{_process.fits}", str(run))
