"""`Trainer.fit(on=…)`: arguments, model and data travel, and every worker builds a Trainer of them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from automodel_trainer.callbacks.preemption import preemption_of
from automodel_trainer.cluster.ray_train import Workers, check_address, check_workers, run_on_ray
from automodel_trainer.cluster.record import Outcome
from automodel_trainer.cluster.worker import check_files, outcome_of
from automodel_trainer.strategies import MeshStrategy


def fit_on(trainer: Any, on: str | None, workers: Workers | None, given: dict[str, Any]) -> Path | None:
    """Run `trainer.fit(**given)` on the workers of a cluster.

    Returns:
        the newest checkpoint, as the workers name it; None if there is none.

    Raises:
        ValueError: see `Trainer.fit`.
    """
    if on is None:
        raise ValueError(f"workers={workers!r} are those of a cluster: give on='ray' too, or Trainer(devices=…).")
    check_address(on)
    strategy = trainer.strategy
    mesh = isinstance(strategy, MeshStrategy)
    sizes = check_workers(workers, strategy.requested_dims if mesh else None)
    arguments = {**trainer.arguments, "devices": "auto", "num_nodes": 1}
    arguments["default_root_dir"] = (
        os.path.abspath(trainer.default_root_dir) if _local(trainer) else trainer.default_root_dir
    )
    given = {name: _absolute(value) for name, value in given.items() if value is not None}
    outcome = run_on_ray(
        partial(_fit, type(trainer), arguments, given),
        on,
        sizes,
        gpu=_wants_gpu(trainer.arguments["accelerator"]),
        root=arguments["default_root_dir"],
        **({"timeout": strategy.timeout} if mesh else {}),
    )
    preemption = preemption_of(trainer)
    if preemption is not None:
        preemption.stopped_by = outcome.stopped_by
    return None if outcome.checkpoint is None else Path(outcome.checkpoint)


def _fit(trainer_class: Any, arguments: dict[str, Any], given: dict[str, Any]) -> Outcome:
    """One worker's fit."""
    check_files(given)
    trainer = trainer_class(**arguments)
    return outcome_of(trainer, trainer.fit(**given))


def _wants_gpu(accelerator: Any) -> bool | None:
    return None if accelerator in ("auto", None) else str(accelerator) in ("gpu", "cuda")


def _local(trainer: Any) -> bool:
    return "://" not in str(trainer.default_root_dir)


def _absolute(value: Any) -> Any:
    """A path that exists here, as an absolute one; anything else as it is."""
    if isinstance(value, (str, os.PathLike)) and os.path.exists(value):
        return os.path.abspath(value)
    return value
