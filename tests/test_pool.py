"""The pool of ranks that the tests share: nothing is left of a job, however many there are."""

from __future__ import annotations

import os
import threading

import torch

from tests.harness import make_strategy
from tests.pool import RankPool
from tests.tiny import tiny_model


def threads() -> int:
    """Of this process, those that Python does not know: a process group has three, a store one."""
    return len(os.listdir("/proc/self/task")) - threading.active_count()


def check_none_left(pool: RankPool, before: list[int]) -> None:
    after = pool.run(len(before), threads)
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)


def sharded_sum(spec: str) -> int:
    """Uses the mesh of a new strategy in operations on DTensors; threads meanwhile."""
    model = make_strategy(spec, 2).parallelize(tiny_model())
    for parameter in model.parameters():
        torch.add(parameter, parameter).full_tensor().sum().item()  # type: ignore[attr-defined]
    return threads()


def test_no_group_outlives_its_job(pool: RankPool) -> None:
    """DTensor's caches hold every mesh that they have seen."""
    pool.run(2, sharded_sum, "fsdp2")  # after which those are there that a process starts once
    before = pool.run(2, threads)
    for spec in ("fsdp2", "fsdp2:tp=2"):
        during = pool.run(2, sharded_sum, spec)
        assert all(now >= then + 3 for now, then in zip(during, before, strict=True)), (before, during)
        check_none_left(pool, before)
