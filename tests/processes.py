"""Jobs of real processes that may be killed, forked from a server that has imported everything: they start at once."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests import rounding
from tests.pool import CONTEXT, _free_port, end_with_parent, meet_at_once, threads


class Job:
    """`function(*args)` on `world_size` ranks, each in a process of its own and in one process group per rank.

    What a rank prints goes to `logs[rank]`; `wait` returns the exit codes (negative: the signal that ended it).
    """

    def __init__(self, folder: Path, function: Callable[..., Any], *args: Any, world_size: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
        port = _free_port()
        self.ranks = [
            CONTEXT.Process(target=_main, args=(rank, world_size, port, self.logs[rank], function, args))
            for rank in range(world_size)
        ]
        for process in self.ranks:
            process.start()

    def log(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(errors="replace") if self.logs[rank].exists() else ""

    def until(self, text: str, rank: int = 0, timeout: float = 300) -> None:
        """Wait for a rank to print `text`."""
        end = time.monotonic() + timeout
        while text not in self.log(rank):
            alive = self.ranks[rank].is_alive() and time.monotonic() < end
            assert alive, f"no {text!r} in:\n{self.log(rank)}"
            time.sleep(0.05)

    def signal(self, number: int, rank: int = 0) -> None:
        """To the rank and its own children, as a terminal, torchrun and Slurm do it."""
        pid = self.ranks[rank].pid
        assert pid is not None
        os.killpg(pid, number)

    def wait(self, timeout: float = 300) -> list[int | None]:
        end = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
        assert None not in codes, "\n".join(self.log(rank) for rank in range(len(self.ranks)))
        return codes


def _main(rank: int, world_size: int, port: int, log: Path, function: Callable[..., Any], args: tuple) -> None:
    os.setsid()
    end_with_parent()
    mp.set_start_method("fork", force=True)  # of data workers, as in a process of its own
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    torch.set_num_threads(threads())
    rounding.install()
    if world_size > 1:
        meet_at_once()
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({key: str(value) for key, value in ranks.items()}, GROUP_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="job")
    function(*args)


def amt(*arguments: str | Path, folder: Path, path: Sequence[Path] = ()) -> str:
    """Run `amt ARGUMENTS` in `folder` and return what it printed; it must succeed.

    Args:
        path: folders to import from beside the environment's.
    """
    return call(folder, run_amt, [str(argument) for argument in arguments], [str(place) for place in path])


def call(folder: Path, function: Callable[..., Any], *args: Any, timeout: float = 900) -> str:
    """Call `function(*args)` in `folder`, in a process of its own, and return what it printed; it must succeed."""
    with tempfile.TemporaryDirectory() as logs:
        job = Job(Path(logs), in_folder, folder, {**os.environ, "OMP_NUM_THREADS": str(threads())}, function, *args)
        assert job.wait(timeout) == [0], job.log()
        return job.log()


def in_folder(folder: Path, environment: Mapping[str, str], function: Callable[..., Any], *args: Any) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    function(*args)


def run_code(code: str, file: Path, *arguments: str) -> None:
    """In this process, what `python FILE ARGUMENTS` runs."""
    main = ModuleType("__main__")
    main.__dict__.update(__file__=str(file), __spec__=None)
    sys.modules["__main__"] = main
    sys.argv = [str(file), *arguments]
    exec(compile(code, file, "exec"), main.__dict__)


def torchrun(max_restarts: int, function: Callable[..., Any], *args: Any) -> None:
    """What `torchrun --standalone --nproc-per-node 2` does, with ranks that are forked."""
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "torchrun", "start_method": "fork"}
    ranks = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": max_restarts}
    elastic_launch(LaunchConfig(**ranks, **rendezvous), function)(*args)


def run_amt(arguments: list[str], path: list[str]) -> None:
    """In this process, what `amt ARGUMENTS` runs."""
    from automodel_trainer.cli import main

    sys.path += path
    sys.argv = ["amt", *arguments]
    main()
