"""Write checkpoints in a thread while training continues."""

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
from automodel_trainer.checkpoint.state import Mirror, Snapshot, take_snapshot, write_snapshot
from automodel_trainer.distributed.agreement import CheckpointError, world_size


class BackgroundSaver:
    """Writes one snapshot at a time in a thread. All ranks must create it.

    The threads of the ranks agree over a gloo group of their own, because training uses the default group meanwhile.
    Between `start` and `wait` a save is in flight. Its tensors lie in `buffers`, so no other snapshot may be taken
    there.

    Args:
        timeout: how long a rank waits for the others to finish writing.

    Attributes:
        buffers: host memory for the copies. The first save allocates it.
        lock: guards data that the thread and its owner share.
        seconds: duration of the last successful save, from its beginning until the checkpoint was complete.
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
        """The folder of the save in flight; None if there is none."""
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
        """Like `checkpoint.save_checkpoint`, but return once everything is copied and write files in the background.

        Collective. If a save is in flight, wait for it first.

        Args:
            folder: the checkpoint to write.
            lightning_checkpoint: Lightning's state, without weights and optimizer state.
            module: the module to save.
            optimizers: the optimizers to save.
            then: called in the thread when the checkpoint is complete and mirrored.
            mirror: called when the checkpoint is complete, before `then`.

        Raises:
            CheckpointError, ValueError: the save in flight failed, or this one cannot begin.
        """
        self.wait()
        self._started = time.monotonic()
        snapshot = take_snapshot(folder, lightning_checkpoint, module, optimizers, self.buffers.copy)
        self.buffers.synchronize()
        self.start(snapshot, folder, then, mirror)

    def start(
        self,
        snapshot: Snapshot,
        folder: Path,
        then: Callable[[], None] | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        """Start writing a snapshot and return at once. Training must not change its tensors (use `buffers`).

        Args:
            snapshot: what to write.
            folder: the checkpoint to write.
            then: called in the thread when the checkpoint is complete and mirrored.
            mirror: called when the checkpoint is complete, before `then`.
        """
        assert self._thread is None, "one save at a time: wait for the previous one"
        self._folder, self._error = folder, None
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, folder, then, mirror), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the save in flight is over, if there is one.

        Args:
            timeout: maximum time to wait, in seconds. None: no limit.

        Returns:
            False if the save is still in flight after `timeout` seconds.

        Raises:
            CheckpointError, ValueError: the save failed. Raised on every rank.
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
        """Release the process group and the memory. Collective. No save may be in flight."""
        assert self._thread is None, "wait for the save in flight first"
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
        except Exception as error:  # another rank died, or took longer than the timeout
            self._error = CheckpointError(0, f"{folder}: {type(error).__name__}: {error}")
            self._error.__cause__ = error
