"""A pool of gloo ranks that all tests share: starting a process costs seconds, a job in it milliseconds.

Processes are forked from one server that has imported everything: what takes ten seconds of a core is done once. (They
have one seed of hashes, so a set has one order on all ranks; ranks of torchrun, as in tests/test_readme.py, have not.)

Each world size has ranks of its own. From one job to the next they keep their process groups and DTensor's caches
(tests/kept_groups.py). They reset the environment variables, the seed, the default dtype and what is garbage.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib
import multiprocessing.connection
import os
import queue
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.trainer.connectors import callback_connector
from torch._dynamo.utils import counters

from tests import kept_groups, pickles, rounding

SIZE = 4
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.forkserver"])
_whole_collections = 0  # that this process had made when its last job began
_TIMEOUT = 600  # seconds that a job may take before the pool is declared stuck: a busy machine takes its time


class RankPool:
    """`pool.run(n, function, *args)` calls a module-level `function(*args)` on `n` ranks, as torchrun would.

    Returns the list of the ranks' results (picklable; plain tensors, not DTensors). An exception in any rank is raised
    here, with the rank's traceback. Groups are kept for the next job of `n` ranks; `own_groups` marks a function that
    must find none (tests/kept_groups.py).
    """

    def __init__(self) -> None:
        self._teams: dict[int, _Team] = {}

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        assert world_size <= SIZE
        if world_size not in self._teams:
            self._teams[world_size] = _Team(world_size)
        return self._teams[world_size].run(function, args, kwargs)

    def close(self) -> None:
        for team in self._teams.values():
            team.close()


class _Team:
    """The ranks of one world size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        self._fresh = False  # whether the next job is to find no groups; a new process has none
        self._stacks = Path(tempfile.mkdtemp(prefix="pool-"))
        self._results = CONTEXT.Queue()
        self._jobs = [CONTEXT.Queue() for _ in range(self.size)]
        self._processes = [
            CONTEXT.Process(target=_worker, args=(rank, self._jobs[rank], self._results, self._stacks), daemon=True)
            for rank in range(self.size)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> list[Any]:
        environment = {
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "TORCHELASTIC_RUN_ID": "pool",
        }
        # Bytes: what cannot be pickled is an error here, and what cannot be read is the rank's error, not its end.
        # (Each rank's own, for the memory of what is no plain tensor is taken over once.)
        for jobs in self._jobs:
            jobs.put((self._fresh, environment, pickles.dumps((function, args, kwargs))))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        in_group: set[bool] = set()
        stuck = ""
        while len(results) + len(errors) < self.size:
            try:
                rank, result, error, initialized = self._next_result(_TIMEOUT if not errors else 20)
            except TimeoutError:  # ranks that wait for a dead one never answer
                stuck = self._ask(set(range(self.size)) - results.keys() - errors.keys())
                self.close()
                self._start()
                break
            (errors if error else results)[rank] = error or pickles.loads(result)
            in_group.add(initialized)
        else:
            self._fresh = bool(errors) or len(in_group) > 1
        if errors:
            said = [f"rank {rank}: {error}" for rank, error in sorted(errors.items())]
            raise AssertionError("\n".join([*said, stuck]))
        if len(results) < self.size:
            raise TimeoutError(f"{function.__name__} did not finish:\n{stuck}")
        return [results[rank] for rank in range(self.size)]

    def _next_result(self, seconds: float) -> tuple[int, Any, str | None, bool]:
        """Of the rank that answers next. Raises TimeoutError after `seconds`, and at once where a process has ended."""
        end = time.monotonic() + seconds
        while True:
            ended = any(not process.is_alive() for process in self._processes)
            try:
                return self._results.get(timeout=1)
            except queue.Empty:
                if ended or time.monotonic() > end:
                    raise TimeoutError from None

    def _ask(self, ranks: set[int]) -> str:
        """Where ranks are that do not answer, or how they ended."""
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR2)
        end = time.monotonic() + 60  # on a busy machine a process is long in coming to it
        while not all(map(self._stack, ranks)) and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(1)  # a stack is written line by line
        return "\n".join(f"rank {rank}: {self._stack(rank) or 'has not said where it is'}" for rank in sorted(ranks))

    def _stack(self, rank: int) -> str:
        code = self._processes[rank].exitcode
        return (self._stacks / str(rank)).read_text() if code is None else f"ended with code {code}"

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        shutil.rmtree(self._stacks, ignore_errors=True)


def _worker(rank: int, jobs: Any, results: Any, stacks: Path) -> None:
    faulthandler.register(signal.SIGUSR2, (stacks / str(rank)).open("w"))
    end_with_parent()
    torch.set_num_threads(threads())
    rounding.install()
    meet_at_once()
    kept_groups.install()
    gc.set_threshold(gc.get_threshold()[0], 1_000_000)  # the second generation is left to `_collect_new`
    mp.set_start_method("fork", force=True)  # of data workers, as in a process of its own
    own_environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    while True:
        fresh, environment, call = jobs.get()
        _reset({**own_environment, **environment})
        alone = False
        try:
            function, args, kwargs = pickles.loads(call)
            alone = kept_groups.has_own_groups(function)
            if (fresh or alone) and dist.is_initialized():
                kept_groups.forget()
            kept_groups.begin()
            result, error = pickles.dumps(function(*args, **kwargs)), None
        except BaseException:
            result, error = b"", traceback.format_exc()
        function, args, kwargs, call = None, (), {}, b""
        if error or alone:  # other ranks may wait for this one: they see that its connections end
            kept_groups.forget()
        results.put((rank, result, error, dist.is_initialized()))


def _reset(environment: dict[str, str]) -> None:
    """What a job may have changed in its process."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    forget_compiled()
    _collect_new()


def _collect_new() -> None:
    """Collect what the job before had not quite let go of at its end, and not what has outlived an earlier job.

    It is in the first two generations, unless the job has asked for a whole collection.
    """
    global _whole_collections
    asked = gc.get_stats()[2]["collections"] > _whole_collections
    gc.collect(2 if asked else 1)
    _whole_collections = gc.get_stats()[2]["collections"]


def threads() -> int:
    """Of a rank's kernels: one, for ranks share the cores; `make test-processors` also tries two."""
    return int(os.environ.get("AMT_TEST_THREADS", "1"))


def seldom_look_for_garbage() -> None:
    """What is imported by now is no garbage, and looking through it again and again took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


def look_once_for_plugins() -> None:
    """Lightning's Trainers look for callbacks among the entry points of all installed packages, 15 ms each."""
    callback_connector._load_external_callbacks = functools.cache(callback_connector._load_external_callbacks)


def forget_compiled() -> None:
    """As in a new process: sizes that differ from earlier ones are compiled as symbols, which takes far longer."""
    if counters["frames"]:
        torch._dynamo.reset()
        counters.clear()


def end_with_parent() -> None:
    """End this process when the one that asked for it is gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def meet_at_once() -> None:
    """Look for rank 0's store only once it is there: torch looks again up to a second later."""
    connect = dist.TCPStore

    @functools.wraps(connect, updated=())
    def when_it_listens(host_name: str, port: int, *args: Any, is_master: bool = False, **kwargs: Any) -> dist.TCPStore:
        end = time.monotonic() + 120
        while not is_master and time.monotonic() < end:
            with suppress(OSError), socket.create_connection((host_name, port), timeout=1):
                break
            time.sleep(0.01)
        return connect(host_name, port, *args, is_master=is_master, **kwargs)

    # `torch.distributed.rendezvous` is a function of that module
    importlib.import_module("torch.distributed.rendezvous").TCPStore = when_it_listens  # type: ignore[attr-defined]


def _free_port() -> int:
    """Below those that the system gives to whoever connects or asks for any: nobody takes it until it is used."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
