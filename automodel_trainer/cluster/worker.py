"""One worker of a run on a cluster: it compares versions, listens to the driver, runs a rank, tells how it ended."""

from __future__ import annotations

import codecs
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from automodel_trainer.callbacks.preemption import stop_running
from automodel_trainer.cluster.record import ABORT, STOP, Outcome, RecordStore
from automodel_trainer.cluster.versions import check_versions
from automodel_trainer.distributed import restarts
from automodel_trainer.distributed.agreement import on_all_ranks

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Given:
    """What the driver sends to every worker.

    Attributes:
        call: calls a method of the `Record` by name and returns its result.
        task: runs the rank and returns how it ended.
        versions: the driver's, see `versions.py`.
        folder: the driver's working folder.
        environment: variables to set.
    """

    call: Callable[..., Any]
    task: Callable[[], Outcome]
    versions: Mapping[str, str]
    folder: str
    environment: Mapping[str, str]


def work(given: Given) -> None:
    """Run this worker's rank.

    What is checked before the run is raised on all workers. A `ValueError` is the user's to fix: it is noted, and the
    worker returns, because the cluster would try again.
    """
    if given.call("error") is not None or given.call("asked") is not None:
        return
    listener = _Listener(given.call)
    listener.start()
    output = Output(given.call) if _rank() == 0 else None
    try:
        on_all_ranks(lambda: check_versions(given.versions, socket.gethostname()), "")
        _enter(given)
        check_even()
        outcome = given.task()
    except ValueError as error:
        given.call("write", traceback.format_exc())
        given.call("refuse", f"{error} (on worker {_rank()}, {socket.gethostname()})")
        return
    except BaseException:
        given.call("write", f"Worker {_rank()} on {socket.gethostname()}:\n{traceback.format_exc()}")
        raise
    finally:
        listener.end()
        if output is not None:
            output.close()
    if _rank() == 0:
        given.call("finish", outcome)


def check_even() -> None:
    """Check that every node has the same number of workers. Collective.

    Raises:
        ValueError: the numbers differ.
    """
    if not dist.is_initialized():
        return
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    counts = {name: names.count(name) for name in names}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(
            f"The nodes of the cluster run different numbers of workers ({each}). Ask for a number that fills nodes "
            "evenly, or take nodes with the same number of GPUs."
        )


def check_files(values: Mapping[str, Any]) -> None:
    """Check that the paths among options are there on every worker. Collective: none waits for one that refuses.

    Args:
        values: what was given, by option.

    Raises:
        ValueError: a path is not there on some worker.
    """

    def look() -> None:
        for option, value in values.items():
            check_file(option, value)

    on_all_ranks(look, "")


def check_file(option: str, value: Any) -> None:
    """Check that a path that the driver could read is there on this worker.

    Args:
        option: its name.
        value: what was given; only an absolute path is looked at.

    Raises:
        ValueError: it is not there.
    """
    if isinstance(value, (str, os.PathLike)) and os.path.isabs(value) and not os.path.exists(value):
        raise ValueError(
            f"{option}={str(value)!r} is on the driver's machine and not on this worker. Put it on a folder that all "
            "machines see, or into object storage, or give the rows themselves (a list or a Dataset)."
        )


def _enter(given: Given) -> None:
    """The driver's folder where this machine has it, its variables, and its memory of restarts."""
    if os.path.isdir(given.folder):
        os.chdir(given.folder)
    os.environ.update(given.environment)
    restarts.use(RecordStore(given.call), "Ray")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_not_rays)
    if logging.getLogger().handlers:  # Ray's, on the root: with Lightning's own, every line would be there twice
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True


def _not_rays(record: logging.LogRecord) -> bool:
    """Leave out what Ray Train says of every report. Its loggers are named by file, and not below one name."""
    return record.levelno >= logging.WARNING or "/ray/train/" not in record.pathname


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class Output:
    """Sends what this process prints to the driver, until `close`. Ray's log files get it, too.

    It works on file descriptors: handlers of loggers and libraries in C have kept theirs.

    Args:
        call: calls a method of the `Record` by name.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._flush()
        self._kept = [os.dup(stream) for stream in (1, 2)]
        reading, writing = os.pipe()
        for stream in (1, 2):
            os.dup2(writing, stream)
        os.close(writing)
        self._thread = threading.Thread(target=self._send, args=(reading,), daemon=True, name="output")
        self._thread.start()

    def close(self) -> None:
        """Send the rest, and give the process its own output back."""
        self._flush()
        for stream, kept in zip((1, 2), self._kept):
            os.dup2(kept, stream)
        self._thread.join(10)  # a child that still runs may hold the pipe open
        for kept in self._kept:
            os.close(kept)

    def _send(self, reading: int) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with os.fdopen(reading, "rb", 0) as pipe:
            while data := pipe.read(65536):
                os.write(self._kept[0], data)
                self._call("write", decoder.decode(data))

    @staticmethod
    def _flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()


class _Listener(threading.Thread):
    """Asks the record once a second whether the driver wants the run to stop."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__(daemon=True, name="driver")
        self._call, self._over = call, threading.Event()

    def run(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            asked = self._call("asked")
            if asked == ABORT:
                os._exit(1)
            if asked == STOP:
                stop_running("SIGINT")

    def end(self) -> None:
        """Listen no longer."""
        self._over.set()
        self.join(10)  # a call that waits for a driver that is gone must not keep this worker


def outcome_of(trainer: Any, checkpoint: Path | str | None) -> Outcome:
    """How a Trainer's run ended on this worker."""
    return Outcome(
        None if checkpoint is None else str(checkpoint), trainer.stopped_by, trainer.exit_code, trainer.world_size
    )
