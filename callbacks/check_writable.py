"""Check before training that what a run will write can be written: folder, space, and credentials of a store."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from automodel_trainer.checkpoint.remote import RemoteRuns
from automodel_trainer.checkpoint.writable import check_folder
from automodel_trainer.distributed.agreement import on_all_ranks

LOST = ", before hours of training are lost"
_STATE_BYTES = 8  # of optimizer state per trained parameter: two numbers in fp32


def check_space(folder: Path, need: int, kept: int, what: str) -> None:
    """Check that there is space for what will be written.

    Args:
        folder: an existing folder, or one below an existing one.
        need: bytes that one write takes.
        kept: writes that lie there at the same time.
        what: what is written, for the message.

    Raises:
        ValueError: not even one fits.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < need:
        raise ValueError(
            f"{what} needs about {_gib(need)} and {existing} has {_gib(free)} free. Make room, or give a folder on a "
            "larger disk."
        )
    if free < need * kept:
        rank_zero_warn(
            f"{what} needs about {_gib(need)}, {kept} of them {_gib(need * kept)}, and {existing} has {_gib(free)} "
            "free. Make room, or keep fewer."
        )


def check_checkpoints(trainer: pl.Trainer, base: Path, remote: RemoteRuns | None, keep_last: int | None) -> None:
    """Check that a run's checkpoints can be written. Collective; rank 0 looks.

    Raises:
        ValueError: the folder or the store cannot be written, or there is no space for one checkpoint.
    """

    def look() -> None:
        check_folder(base, "Checkpoints", LOST)
        need = checkpoint_bytes(trainer.strategy.model or trainer.lightning_module, trainer.optimizers)
        check_space(base, need, 1 + (keep_last or 1), "A checkpoint")
        if remote is not None:
            try:
                remote.check_writable()
            except OSError as error:
                raise ValueError(
                    f"Checkpoints cannot be written to {remote}: {error}. Look at the credentials (environment "
                    "variables of the store), the name and the endpoint."
                ) from error

    on_all_ranks(look if trainer.is_global_zero else lambda: None, base)


def checkpoint_bytes(module: nn.Module, optimizers: Sequence[Optimizer]) -> int:
    """About how many bytes a checkpoint takes: the weights (of adapters these alone) and the optimizer's state."""
    trained = {id(p): p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    parameters = list(module.parameters())
    frozen = [p for p in parameters if id(p) not in trained]
    saved = list(trained.values()) if frozen and len(trained) < len(frozen) else parameters
    return sum(p.numel() * p.element_size() for p in saved) + _STATE_BYTES * sum(p.numel() for p in trained.values())


def export_bytes(module: nn.Module, dtype: torch.dtype | None) -> int:
    """About how many bytes an export of a whole model takes."""
    return sum(p.numel() * (dtype.itemsize if dtype is not None else p.element_size()) for p in module.parameters())


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**29 else f"{count / 2**20:,.1f} MiB"
