"""Let the ranks of a trial step know that one of them has run out of memory, outside of the model's collectives."""

from __future__ import annotations

import threading
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from automodel_trainer.distributed._store import default_store
from automodel_trainer.distributed.agreement import gather, rank, world_size

PATIENCE = (
    60.0  # seconds that a rank without memory waits for others, at least: they may stand in a collective for ever
)
_LOOK = 0.5  # seconds between two looks whether a rank has run out


class RanOutElsewhere(torch.OutOfMemoryError):
    """Another rank ran out of memory. This one stopped at the next place where all ranks look."""


class Stuck(Exception):
    """The ranks cannot go on: one ran out of memory while others wait for it in a collective of the model.

    Args:
        rank: the rank without memory.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} ran out of memory")
        self.rank = rank


class Together:
    """Ranks that run the same steps. Collective; with one rank it does nothing.

    Args:
        timeout: how long a rank waits for others that are slow.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._alone = world_size() == 1
        self._found: int | None = None  # the rank that ran out
        self._over = threading.Event()
        self._begun = time.monotonic()
        if not self._alone:
            self._group = dist.new_group(backend="gloo", timeout=timeout)
            self._flag = torch.zeros(1, dtype=torch.int64)  # made now: there may be no memory later
            self._key = f"out of memory {gather(uuid.uuid4().hex)[0]}"
            self._thread = threading.Thread(target=self._watch, name="out of memory", daemon=True)
            self._thread.start()

    def begin(self) -> None:
        """A trial begins."""
        self._begun = time.monotonic()

    def look(self) -> None:
        """Wait for all ranks to come here or to run out of memory.

        Raises:
            RanOutElsewhere: one has run out.
        """
        if not self._alone:
            self._exchange(0).wait()
            if self._flag.item():
                raise RanOutElsewhere

    def ran_out(self) -> None:
        """Tell the others that this rank has no memory left, and wait for them to look.

        Raises:
            Stuck: they do not. They wait for this rank, until its process ends.
        """
        if self._alone:
            return
        default_store().set(self._key, str(rank()))
        try:
            self._exchange(1).wait(timedelta(seconds=max(PATIENCE, time.monotonic() - self._begun)))
        except RuntimeError as error:
            raise Stuck(rank()) from error

    def explain(self, error: RuntimeError) -> None:
        """Raise `Stuck` if an error of a collective came because another rank ran out of memory, and ended."""
        if self._found is not None:
            raise Stuck(self._found) from error

    def close(self) -> None:
        """End the group. After an error it stays: others may wait in it."""
        if not self._alone:
            dist.destroy_process_group(self._group)

    def stop(self) -> None:
        """End the thread."""
        self._over.set()

    def _exchange(self, value: int) -> dist.Work:
        self._flag.fill_(value)
        work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        return work

    def _watch(self) -> None:
        """Note which rank runs out while the store still answers: it may end with that rank."""
        store = default_store()
        while self._found is None and not self._over.wait(_LOOK):
            try:
                if store.check([self._key]):
                    self._found = int(store.get(self._key))
            except (RuntimeError, ValueError):  # the store has ended with its rank
                return
