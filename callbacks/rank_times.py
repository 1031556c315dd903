"""What each rank spent its time on, as lines of JSON in the run's folder: `amt watch` shows which rank is slow."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import torch

from automodel_trainer.callbacks.layout import sum_over_ranks
from automodel_trainer.checkpoint.remote import local_root

FILE = "ranks.jsonl"
NAMES = ("data_wait", "cpu", "peak_memory_gib")
"""Of each rank: seconds a step that it waited for its batch, seconds a step of CPU time of its process, peak memory."""


def write_rank_times(trainer: pl.Trainer, steps: int, waited: float, cpu: float, memory_gib: float) -> None:
    """Add a line with the times of every rank. Collective.

    Args:
        trainer: of the run.
        steps: optimizer steps since the last line.
        waited: seconds that this rank waited for data in them.
        cpu: seconds of CPU time of this process in them.
        memory_gib: peak memory of this rank.
    """
    table = torch.zeros(trainer.world_size, len(NAMES), device=trainer.strategy.root_device)
    table[trainer.global_rank] = torch.tensor([waited / steps, cpu / steps, memory_gib])
    columns = sum_over_ranks(trainer, table).T.tolist()
    if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
        line = {"step": trainer.global_step, **dict(zip(NAMES, columns))}
        folder = local_root(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
