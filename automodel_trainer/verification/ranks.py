"""Starts the ranks of a run as processes on this machine and collects their results."""

from __future__ import annotations

import logging
import os
import queue
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Outcome = tuple[int, Any, str | None, str]
"""Rank, result, traceback if it failed, and the message of a ValueError."""


class Launcher(Protocol):
    """Calls a function on `world_size` ranks with torchrun's environment variables. Returns their results by rank."""

    def __call__(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]: ...


class Processes:
    """A `Launcher` that starts every rank as a process.

    Args:
        start_method: "spawn", or "fork". Fork starts faster, but not after this process ran a backward pass or used
            CUDA: the children would hang or fail.
        timeout: seconds to wait for all results.

    Raises:
        ValueError: a rank raised one; with its message.
        RuntimeError: a rank raised another error, died, or did not answer in time.
    """

    def __init__(self, start_method: str = "spawn", timeout: float = 600) -> None:
        self.start_method, self.timeout = start_method, timeout

    def __call__(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        context: Any = mp.get_context(self.start_method)
        outcomes: Any = context.Queue()
        port = _free_port()
        processes = [
            context.Process(target=_rank, args=(outcomes, rank, world_size, port, function, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return self._collect(outcomes, processes)
        finally:
            for process in processes:
                process.kill()
                process.join()

    def _collect(self, outcomes: Any, processes: list[Any]) -> list[Any]:
        results: dict[int, Any] = {}
        waited = 0.0
        while len(results) < len(processes):
            try:
                rank, result, trace, message = outcomes.get(timeout=1)
            except queue.Empty:
                waited += 1
                self._check_alive(processes, results, waited)
                continue
            if message:
                raise ValueError(message) from RuntimeError(trace)
            if trace:
                raise RuntimeError(f"rank {rank} failed:\n{trace}")
            results[rank] = result
        return [results[rank] for rank in range(len(processes))]

    def _check_alive(self, processes: list[Any], results: dict[int, Any], waited: float) -> None:
        dead = [rank for rank, p in enumerate(processes) if rank not in results and p.exitcode not in (None, 0)]
        if dead:
            raise RuntimeError(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode} (out of memory?).")
        if waited > self.timeout:
            raise RuntimeError(f"Ranks {sorted(set(range(len(processes))) - results.keys())} gave no answer.")


def _rank(outcomes: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch warns about shapes and views on every rank; the table shows what matters
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    names: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": world_size,
        "MASTER_PORT": port,
    }
    names |= {"LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "verify"}
    os.environ.update({name: str(value) for name, value in names.items()})
    outcome: Outcome
    try:
        outcome = (rank, function(*args), None, "")
    except ValueError as error:
        outcome = (rank, None, traceback.format_exc(), str(error))
    except BaseException:
        outcome = (rank, None, traceback.format_exc(), "")
    outcomes.put(outcome)
    outcomes.close()
    outcomes.join_thread()
    if dist.is_initialized() and outcome[2] is None:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
