"""Tell a run that torchrun restarts (`--max-restarts`) which run folder to continue, through torchrun's store."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from automodel_trainer.distributed.rendezvous import outliving_store

_TIMEOUT = timedelta(seconds=60)


class _Process:
    """The number of fits that this process has begun.

    A script may call `fit` more than once. After a restart it calls them in the same order, so the number identifies
    a fit.
    """

    fits = 0


_process = _Process()


def begin_fit() -> Path | None:
    """Count a new fit. Every rank calls this when `fit` begins.

    Returns:
        The run folder that this fit had before the restart; None if there was none.
    """
    _process.fits += 1
    store = outliving_store(_TIMEOUT)
    key = f"automodel_trainer/fit-{_process.fits}"
    return Path(store.get(key).decode()) if store is not None and store.check([key]) else None


def remember(run: Path) -> None:
    """Note that the latest fit writes its checkpoints into the folder `run`. One rank calls this."""
    store = outliving_store(_TIMEOUT)
    if store is not None:
        store.set(f"automodel_trainer/fit-{_process.fits}", str(run))
