"""In a worker of Ray Train, the Trainer's ranks are Ray's."""

from __future__ import annotations

from typing import Any

from lightning.fabric.plugins.environments import ClusterEnvironment

from automodel_trainer.distributed.ray_worker import ray_context


def with_environment(plugins: Any) -> Any:
    """The plugins, in a worker of Ray Train with its `RayLightningEnvironment`, unless an environment is given."""
    if ray_context() is None:
        return plugins
    given = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins] if plugins is not None else []
    if any(isinstance(plugin, ClusterEnvironment) for plugin in given):
        return plugins
    from ray.train.lightning import RayLightningEnvironment

    return [*given, RayLightningEnvironment()]
