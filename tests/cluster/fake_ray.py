"""Ray as far as this project calls it: actors in this process, one worker that runs here, restarts; and a worker."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment


class Ray:
    """The state of the stand-in.

    Attributes:
        resources: of its cluster.
        runs: how often the worker was started.
        scaling, config: what the last TorchTrainer was given.
    """

    def __init__(self, resources: dict[str, float]) -> None:
        self.resources = resources
        self.running = False
        self.addresses: list[Any] = []
        self.runs = 0
        self.scaling: Any = None
        self.config: Any = None

    def init(self, address: Any = None, **_: Any) -> None:
        self.addresses.append(address)
        self.running = True

    def shutdown(self) -> None:
        self.running = False


class _Actor:
    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: getattr(self._thing, name)(*args))


@dataclass
class _Options:
    given: dict[str, Any]


def install(monkeypatch: pytest.MonkeyPatch, resources: dict[str, float]) -> Ray:
    """Make `import ray` and its parts find the stand-in."""
    state = Ray(resources)

    def options(**given: Any) -> _Options:
        return _Options(given)

    class TorchTrainer:
        def __init__(self, work: Any, scaling_config: _Options, run_config: _Options, torch_config: _Options) -> None:
            self.work, self.failures = work, run_config.given["failure_config"].given["max_failures"]
            state.scaling, state.config = scaling_config.given, run_config.given

        def fit(self) -> None:
            for attempt in range(self.failures + 1):
                state.runs += 1
                try:
                    self.work()
                    return
                except Exception:
                    if attempt == self.failures:
                        raise

    ray, train, torch = ModuleType("ray"), ModuleType("ray.train"), ModuleType("ray.train.torch")
    ray.__dict__.update(
        init=state.init,
        shutdown=state.shutdown,
        is_initialized=lambda: state.running,
        cluster_resources=lambda: state.resources,
        remote=lambda **_: lambda kind: SimpleNamespace(remote=lambda: _Actor(kind())),
        get=lambda value: value,
        train=train,
    )
    train.__dict__.update(FailureConfig=options, RunConfig=options, ScalingConfig=options, torch=torch)
    torch.__dict__.update(TorchConfig=options, TorchTrainer=TorchTrainer)
    for name, module in (("ray", ray), ("ray.train", train), ("ray.train.torch", torch)):
        monkeypatch.setitem(sys.modules, name, module)
    return state


def as_worker(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, float], str | None]]:
    """Make this process the one worker of a TorchTrainer. Returns what is reported: metrics, and checkpoint.json."""
    install(monkeypatch, {})
    reports: list[tuple[dict[str, float], str | None]] = []

    def report(metrics: dict[str, float], checkpoint: str | None = None) -> None:
        reports.append((metrics, checkpoint))

    train, lightning = sys.modules["ray.train"], ModuleType("ray.train.lightning")
    one, zero = lambda: 1, lambda: 0
    context = SimpleNamespace(get_world_size=one, get_local_world_size=one, get_world_rank=zero)
    checkpoint = SimpleNamespace(from_directory=lambda folder: (Path(folder) / "checkpoint.json").read_text())
    train.__dict__.update(get_context=lambda: context, report=report, Checkpoint=checkpoint, lightning=lightning)
    lightning.__dict__.update(RayLightningEnvironment=type("RayLightningEnvironment", (LightningEnvironment,), {}))
    monkeypatch.setitem(sys.modules, "ray.train.lightning", lightning)
    return reports
