"""The pool of ranks that the tests share: what a job keeps for the next one, and what it does not."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.harness import make_strategy
from tests.kept_groups import own_groups
from tests.pool import RankPool
from tests.tiny import tiny_model


def threads() -> int:
    """Of this process, those that Python does not know: a process group has three, a store one."""
    return len(os.listdir("/proc/self/task")) - threading.active_count()


def sharded_sum(spec: str) -> int:
    """Uses the mesh of a new strategy in operations on DTensors; threads meanwhile."""
    model = make_strategy(spec, 2).parallelize(tiny_model())
    for parameter in model.parameters():
        torch.add(parameter, parameter).full_tensor().sum().item()  # type: ignore[attr-defined]
    return threads()


def test_groups_are_those_of_the_job_before(pool: RankPool) -> None:
    """However many jobs there are, and whichever layouts they take turns with."""
    specs = ("fsdp2", "fsdp2:tp=2")
    before = [pool.run(2, sharded_sum, spec) for spec in specs][-1]
    for spec in specs:
        assert pool.run(2, sharded_sum, spec) == before


def names() -> list[str]:
    """Of two equal meshes, which may not share a group within one job."""
    strategy = make_strategy("fsdp2:tp=2", 4)
    again = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    meshes = (strategy.device_mesh["tp"], again["tp"])
    return [mesh.get_group().group_name for mesh in meshes]


def test_each_mesh_of_a_job_has_its_own_groups(pool: RankPool) -> None:
    first, second = pool.run(4, names), pool.run(4, names)
    assert first == second
    assert all(len(set(of_rank)) == 2 for of_rank in first)


@own_groups
def starts_its_own() -> tuple[bool, float]:
    found = dist.is_initialized()
    dist.init_process_group("gloo")
    total = torch.ones(())
    dist.all_reduce(total)
    return found, float(total)


def initialized() -> bool:
    return dist.is_initialized()


def test_a_job_with_its_own_groups_finds_none_and_leaves_none(pool: RankPool) -> None:
    """None of its own, and none of the jobs before: DTensor's caches hold every mesh that they have seen."""
    pool.run(2, sharded_sum, "fsdp2")  # after which those threads are there that a process starts once
    assert pool.run(2, starts_its_own) == [(False, 2.0)] * 2
    before = pool.run(2, threads)
    during = pool.run(2, sharded_sum, "fsdp2:tp=2")
    assert all(now >= then + 3 for now, then in zip(during, before, strict=True)), (before, during)
    assert pool.run(2, initialized) == [True, True]
    assert pool.run(2, starts_its_own) == [(False, 2.0)] * 2
    assert pool.run(2, initialized) == [False, False]
    after = pool.run(2, threads)
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)


def stops_one(rank: int, error: bool) -> None:
    """On one rank alone."""
    make_strategy("fsdp2:tp=2", 2)
    if dist.get_rank() == rank:
        if error:
            raise RuntimeError("on purpose")
        dist.destroy_process_group()


@pytest.mark.parametrize("error", [True, False])
def test_after_an_accident_all_groups_are_new(pool: RankPool, error: bool) -> None:
    for rank in range(2):
        if error:
            with pytest.raises(AssertionError, match="on purpose"):
                pool.run(2, stops_one, rank, error)
        else:
            pool.run(2, stops_one, rank, error)
        pool.run(2, sharded_sum, "fsdp2:tp=2")  # hangs or raises where one rank has other groups


class OnlyHere:
    """What no other process can read."""

    def __reduce__(self) -> Any:
        return __import__, ("a_module_of_nobody",)


def test_what_a_rank_cannot_read_is_its_error(pool: RankPool) -> None:
    with pytest.raises(AssertionError, match="No module named 'a_module_of_nobody'"):
        pool.run(1, print, OnlyHere())
    assert pool.run(1, abs, -3) == [3]


def test_a_rank_that_ends_is_noticed(pool: RankPool) -> None:
    with pytest.raises(TimeoutError, match="rank 1: ended with code 5"):
        pool.run(2, end_rank_1)
    pool.run(2, sharded_sum, "fsdp2:tp=2")


def end_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os._exit(5)


def changes_much() -> None:
    os.environ["LEFT_BY_A_JOB"] = "1"
    os.environ["WORLD_SIZE"] = "7"
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(5)


def state() -> Any:
    return (
        os.environ.get("LEFT_BY_A_JOB"),
        [os.environ[name] for name in ("RANK", "WORLD_SIZE")],
        str(torch.get_default_dtype()),
        float(torch.rand(())),
    )


def test_a_job_begins_with_the_state_of_the_first(pool: RankPool) -> None:
    before = pool.run(2, state)
    pool.run(2, changes_much)
    assert pool.run(2, state) == before
    assert [found[:3] for found in before] == [(None, [str(rank), "2"], "torch.float32") for rank in range(2)]
