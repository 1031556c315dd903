"""Saves that are written while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from automodel_trainer.checkpoint.host_copies import HostBuffers
from automodel_trainer.checkpoint.state import Mirror, Snapshot, stage, write_snapshot
from automodel_trainer.distributed.agreement import CheckpointError, world_size


class BackgroundSaver:
    """Writes one snapshot at a time in a thread, whose ranks agree over a gloo group of their own. Made on all ranks.

    Between `start` and `wait` a save is in flight, and its tensors lie in `buffers`: nothing else may be staged there.

    Args:
        timeout: how long a rank waits for the others to have written.

    Attributes:
        buffers: host memory, taken by the first save and kept.
        lock: for what the thread and its owner share.
        seconds: from the beginning of the last save that ended until it was whole.
    """

    def __init__(self, timeout: timedelta = timedelta(hours=1)) -> None:
        self.buffers = HostBuffers()
        self.lock = threading.Lock()
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._folder: Path | None = None
        self.seconds, self._started = 0.0, 0.0

    @property
    def in_flight(self) -> Path | None:
        """The folder whose save has not been waited for."""
        return self._folder

    def save(
        self,
        folder: Path,
        lightning_checkpoint: dict[str, Any],
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        then: Callable[[], None] | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        """As `checkpoint.save_checkpoint`, but return when all is copied; the files are written in the background.

        Collective. Waits for the save in flight, if there is one, and raises what became of it.

        Args:
            then: called in the thread once the checkpoint is whole, and mirrored.
        """
        self.wait()
        self._started = time.monotonic()
        snapshot = stage(folder, lightning_checkpoint, module, optimizers, self.buffers.copy)
        self.buffers.synchronize()
        self.start(snapshot, folder, then, mirror)

    def start(
        self,
        snapshot: Snapshot,
        folder: Path,
        then: Callable[[], None] | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        """Begin to write a snapshot of tensors that training leaves alone (staged into `buffers`); returns at once."""
        assert self._thread is None, "one save at a time: wait for the one before"
        self._folder, self._error = folder, None
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, folder, then, mirror), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the save in flight is over, if there is one.

        Returns:
            False if it is not after `timeout` seconds.

        Raises:
            CheckpointError, ValueError: it failed; raised on every rank.
        """
        if self._thread is None:
            return True
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self._thread, self._folder = None, None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True

    def close(self) -> None:
        """Let go of the group and the memory. Collective; nothing may be in flight."""
        assert self._thread is None, "wait first"
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self.buffers.clear()

    def _write(self, snapshot: Snapshot, folder: Path, then: Callable[[], None] | None, mirror: Mirror | None) -> None:
        try:
            write_snapshot(snapshot, folder, self._group, mirror)
            if then is not None:
                then()
            self.seconds = time.monotonic() - self._started
        except (OSError, ValueError) as error:
            self._error = error
        except Exception as error:  # a rank that died, or took longer than the timeout
            self._error = CheckpointError(0, f"{folder}: {type(error).__name__}: {error}")
            self._error.__cause__ = error
