"""What a run leaves to the one that torchrun starts in its place (`--max-restarts`): the store outlives both."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from automodel_trainer.distributed.rendezvous import outliving_store

_TIMEOUT = timedelta(seconds=60)
_fits = 0  # a script may call fit more than once: a restarted one does so in the same order


def begin_fit() -> Path | None:
    """To be called on every rank as `fit` begins: the run folder that it had before the restart, if it had one."""
    global _fits
    _fits += 1
    store = outliving_store(_TIMEOUT)
    key = f"automodel_trainer/fit-{_fits}"
    return Path(store.get(key).decode()) if store is not None and store.check([key]) else None


def remember(run: Path) -> None:
    """To be called on one rank: this is where the fit that has begun last writes its checkpoints."""
    store = outliving_store(_TIMEOUT)
    if store is not None:
        store.set(f"automodel_trainer/fit-{_fits}", str(run))
