"""Lightning's BoringModel under our Trainer: what the tests of Lightning's contract share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

from automodel_trainer import Trainer

WHOLE_EPOCHS: dict[str, Any] = {"limit_train_batches": 1.0, "limit_val_batches": 1.0}
"""Options of `make`: all batches of the data."""


def make(root: Path | str, **kwargs: Any) -> Trainer:
    """A quiet Trainer of one epoch of two batches on one CPU."""
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_ledger": False, "num_sanity_val_steps": 0}
    return Trainer(**{**defaults, **quiet, "default_root_dir": str(root), **kwargs})


def loader(rows: int = 4, **kwargs: Any) -> DataLoader:
    return DataLoader(RandomDataset(32, rows), **kwargs)


def weight(module: BoringModel) -> torch.Tensor:
    return module.layer.weight.detach().clone()
