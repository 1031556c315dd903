"""Rendezvous after a restart by torchrun: a fresh store, without entries of the processes before."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist


def outliving_store(timeout: timedelta) -> dist.Store | None:
    """The store of torchrun's agent, which outlives a restart of the ranks. None if torchrun's agent keeps no store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def agent_store(timeout: timedelta) -> dist.Store | None:
    """A fresh part of the store of torchrun's agent; None if torchrun's agent keeps no store. Collective.

    After a restart the store still holds the addresses of the old ranks, and new ranks would try to connect to dead
    processes (pytorch/pytorch#135712). We cannot use the restart count as a prefix: on several nodes, each agent counts
    for itself.

    Raises:
        TimeoutError: a rank did not come in time.
    """
    store = outliving_store(timeout)
    if store is None:
        return None
    return fresh_store(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout)


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of `store` that only these processes use, and none before them. Collective.

    Every rank draws a random name and writes it into the store. Rank 0 answers each name it finds with its own, which
    becomes the prefix of the new store. A rank that gets an answer to its new name knows that it comes from a living
    rank 0. Rank 0 returns when all ranks have confirmed.

    Raises:
        TimeoutError: a rank did not come within `timeout`.
    """
    own = uuid.uuid4().hex
    if rank != 0:
        store.set(f"hello/{rank}", own)
        first = store.get(f"answer/{own}").decode()
        store.set(f"confirmed/{first}/{rank}", "")
        return dist.PrefixStore(first, store)
    end = time.monotonic() + timeout.total_seconds()
    waiting = list(range(1, world_size))
    while waiting:
        for other in waiting:  # again in each round: what is there may be a name of the attempt before
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", own)
        time.sleep(0.02)
        waiting = [other for other in waiting if not store.check([f"confirmed/{own}/{other}"])]
        if waiting and time.monotonic() > end:
            raise TimeoutError(f"Rank(s) {waiting} did not join within {timeout}. Look at their output for an error.")
    return dist.PrefixStore(own, store)
