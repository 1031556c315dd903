"""Callbacks: code that runs around training steps. Imported as `automodel_trainer.callbacks`.

Each callback is imported on first use. `defaults.py` lists those that every Trainer has.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from automodel_trainer.callbacks.batch_preview import BatchPreview
    from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
    from automodel_trainer.callbacks.garbage_collection import GarbageCollection
    from automodel_trainer.callbacks.hf_export import HFExport
    from automodel_trainer.callbacks.ledger import Ledger
    from automodel_trainer.callbacks.moe_load import MoELoad
    from automodel_trainer.callbacks.preemption import Preemption
    from automodel_trainer.callbacks.progress import ProgressLine
    from automodel_trainer.callbacks.ray_report import RayReport
    from automodel_trainer.callbacks.sample_generations import SampleGenerations
    from automodel_trainer.callbacks.throughput import Throughput
    from automodel_trainer.callbacks.watchdog import Watchdog

_FILES = {
    "BatchPreview": "batch_preview",
    "DCPCheckpoint": "dcp_checkpoint",
    "GarbageCollection": "garbage_collection",
    "HFExport": "hf_export",
    "Ledger": "ledger",
    "MoELoad": "moe_load",
    "Preemption": "preemption",
    "ProgressLine": "progress",
    "RayReport": "ray_report",
    "SampleGenerations": "sample_generations",
    "Throughput": "throughput",
    "Watchdog": "watchdog",
}

__all__ = [
    "BatchPreview",
    "DCPCheckpoint",
    "GarbageCollection",
    "HFExport",
    "Ledger",
    "MoELoad",
    "Preemption",
    "ProgressLine",
    "RayReport",
    "SampleGenerations",
    "Throughput",
    "Watchdog",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
