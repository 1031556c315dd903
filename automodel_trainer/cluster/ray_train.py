"""The driver's side of a run on Ray: find the cluster, check it, start Ray Train's workers, pass Ctrl-C on."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from automodel_trainer.checkpoint.remote import is_remote
from automodel_trainer.cluster.record import ABORT, STOP, Outcome, Record
from automodel_trainer.cluster.versions import versions
from automodel_trainer.cluster.worker import Given, work
from automodel_trainer.distributed.mesh import ParallelDims

Workers = int | tuple[int, int]
RESTARTS = 3
CONNECT_SECONDS = 10
_TRAVELS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "AMT_CACHE", "HF_HOME", "HF_TOKEN", "TOKENIZERS_PARALLELISM")


def check_address(on: str) -> None:
    """Check the address of a cluster.

    Args:
        on: "ray" (the cluster that RAY_ADDRESS names or that runs here; else one is started on this machine), or
            "ray://HOST:PORT".

    Raises:
        ValueError: it is neither, or nothing answers there.
    """
    if on == "ray":
        return
    found = re.fullmatch(r"ray://([^:/]+|\[[^\]]+\]):(\d+)", on)
    if found is None:
        raise ValueError(f"on={on!r} is no cluster. Give 'ray', or the address of a Ray cluster: 'ray://HOST:10001'.")
    host, port = found[1].strip("[]"), int(found[2])
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"No Ray cluster answers at {on} ({error}). Start one there (ray start --head --ray-client-server-port "
            f"{port}), or give on='ray' for one on this machine."
        ) from error


def check_workers(workers: Workers | None, dims: ParallelDims | None) -> tuple[int, int]:
    """The least and the largest number of workers.

    Args:
        workers: a number, or the least and the largest, between which the run is resized.
        dims: the sizes of the layout; None: it has none.

    Raises:
        ValueError: it is no such number, or the layout does not fit.
    """
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    if not isinstance(least, int) or not isinstance(most, int) or not 1 <= least <= most:
        raise ValueError(
            f"workers={workers!r} is no number of workers. Give one (8), or the least and the largest for a run that "
            "is resized ((4, 8))."
        )
    if dims is None:
        return least, most
    fits = [n for n in range(1, 4 * most + 1) if dims.fits(n)]
    for size in range(least, most + 1):  # Ray may take any of them
        if size not in fits:
            near = sorted(fits, key=lambda n: (abs(n - size), n))[:4]
            given = " × ".join(f"{name}={n}" for name, n in dims.axes.items() if n not in (1, -1))
            more = f" Numbers that work: {', '.join(map(str, sorted(near)))}." if near else ""
            raise ValueError(f"workers={size} does not fit the layout {given}: its sizes must multiply to it.{more}")
    return least, most


def run_on_ray(
    task: Callable[[], Outcome],
    on: str,
    workers: tuple[int, int],
    *,
    gpu: bool | None,
    root: str,
    timeout: timedelta = timedelta(minutes=30),
) -> Outcome:
    """Run `task` on every worker of a Ray cluster and wait. What workers print is printed here.

    Ctrl-C saves a checkpoint and stops; a second one stops at once. A lost worker starts all workers again, `RESTARTS`
    times; they go on from the newest whole checkpoint.

    Args:
        task: runs one rank; it is pickled.
        on: see `check_address`.
        workers: the least and the largest number.
        gpu: one GPU for each worker; None: if the cluster has enough.
        root: the run's folder. Ray's own files go below it.
        timeout: how long a collective waits for a missing worker.

    Raises:
        ValueError: Ray is missing, the cluster is too small, or a worker refuses the run.
        KeyboardInterrupt: after a second Ctrl-C.
    """
    ray = _ray()
    own = not ray.is_initialized()
    if own:
        _connect(ray, on)
    gpu = check_cluster(ray.cluster_resources(), workers[0], gpu)
    record = ray.remote(num_cpus=0)(Record).remote()
    call = partial(_call, record)
    travels = {name: os.environ[name] for name in _TRAVELS if name in os.environ}
    given = Given(call, task, versions(), os.getcwd(), travels)
    try:
        error = _wait(
            partial(_fit, given, workers, gpu, root, timeout), call, stop_at_once=ray.shutdown if own else None
        )
        if (message := call("error")) is not None:
            raise ValueError(message)
        outcome = call("outcome")
        if error is not None and outcome is None:
            raise error
        assert outcome is not None, "a run without an error has an outcome"
        return outcome
    finally:
        if own and ray.is_initialized():
            ray.shutdown()


def check_cluster(resources: Mapping[str, float], workers: int, gpu: bool | None) -> bool:
    """Whether workers get a GPU each.

    Args:
        resources: of the whole cluster, as Ray names them.
        workers: how many there are at least.
        gpu: whether they must; None: if there are enough.

    Raises:
        ValueError: the cluster has too few.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if gpu is None:
        gpu = gpus >= workers
        if gpus and not gpu:
            rank_zero_warn(
                f"workers={workers}, and the cluster has {gpus} GPU(s): this run computes on CPUs. Ask for at most "
                f"{gpus} workers, or give accelerator='gpu' to be refused instead."
            )
    has, what = (gpus, "GPU(s)") if gpu else (cpus, "CPU(s)")
    if has < workers:
        raise ValueError(
            f"workers={workers} need one of the cluster's {what} each, and it has {has}. Ask for fewer, or add nodes; "
            "Ray would wait for them without an end."
        )
    return gpu


def _ray() -> Any:
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # workers' output comes by another way
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.train.torch
    except ImportError as error:
        raise ValueError("on='ray' needs Ray: pip install 'automodel-trainer[ray]'.") from error
    return ray


def _connect(ray: Any, on: str) -> None:
    try:
        ray.init(address=None if on == "ray" else on, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"The Ray cluster of on={on!r} cannot be used: {error}") from error


def _call(record: Any, method: str, *args: Any) -> Any:
    import ray

    return ray.get(getattr(record, method).remote(*args))


def _fit(given: Given, workers: tuple[int, int], gpu: bool, root: str, timeout: timedelta) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    least, most = workers
    storage = f"{root.rstrip('/')}/ray" if is_remote(root) else str((Path(root) / "ray").absolute())
    TorchTrainer(
        partial(work, given),
        scaling_config=ScalingConfig(num_workers=least if least == most else (least, most), use_gpu=gpu),
        run_config=RunConfig(storage_path=storage, failure_config=FailureConfig(max_failures=RESTARTS)),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=int(timeout.total_seconds())
        ),
    ).fit()


def _wait(
    run: Callable[[], None], call: Callable[..., Any], stop_at_once: Callable[[], None] | None
) -> Exception | None:
    """Run in a thread, and wait here, where Ctrl-C arrives. Returns the error that ended the run, if one did."""
    errors: list[Exception] = []
    over = threading.Event()

    def catch() -> None:
        try:
            run()
        except Exception as error:
            errors.append(error)
        finally:
            over.set()

    threading.Thread(target=catch, daemon=True, name="ray").start()
    asked = False
    while not over.is_set():
        try:
            over.wait(0.2)  # not `join`: a Ctrl-C inside of it would leave a thread that counts as ended
            _show(call)
        except KeyboardInterrupt:
            if asked:
                call("ask", ABORT)
                if stop_at_once is not None:
                    stop_at_once()
                raise
            asked = True
            print("\nCtrl-C: saving a checkpoint after this step. Press again to stop now without saving.", flush=True)
            call("ask", STOP)
    _show(call)
    return errors[0] if errors else None


def _show(call: Callable[..., Any]) -> None:
    text = call("take")
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
