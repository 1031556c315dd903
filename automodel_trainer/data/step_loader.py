"""The torch DataLoader around a data set of whole steps, and what its workers do with signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from automodel_trainer.data.worker_errors import telling


def step_loader(dataset: Dataset, num_workers: int, **options: Any) -> DataLoader:
    """A torch DataLoader for a data set whose items are whole steps: it adds workers and pinned memory, no batching.

    With workers it is to be read through `items_of`.
    """
    return DataLoader(
        telling(dataset) if num_workers else dataset,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_survive_signals,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # the loader would otherwise draw from the global generator in every epoch
        **options,
    )


def _survive_signals(worker: int) -> None:
    """Keep a worker alive when signals ask the run to save and stop (Ctrl-C, torchrun, Slurm): it is still needed.

    The worker leaves its parent's process group. It exits on a SIGTERM from its parent only, or when its parent dies.
    """
    os.setpgid(0, 0)
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot tell a process who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
        continue
    os._exit(0)


def _unchanged(item: Any) -> Any:
    return item
