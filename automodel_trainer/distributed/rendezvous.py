"""A store in which nothing is left of processes that torchrun has restarted."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist


def outliving_store(timeout: timedelta) -> dist.Store | None:
    """The store that torchrun's agent keeps for its ranks, and that is still there after a restart. None elsewhere."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def agent_store(timeout: timedelta) -> dist.Store | None:
    """Of the store that torchrun's agent keeps the part for this attempt; None elsewhere. Collective.

    The store still has the addresses that ranks left in it before a restart, and new ranks would try to reach
    processes that are dead (pytorch/pytorch#135712). The restart count cannot keep attempts apart: on several nodes
    each agent counts for itself.
    """
    store = outliving_store(timeout)
    if store is None:
        return None
    return fresh_store(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout)


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The part of `store` that these processes, and none before them, use. Collective.

    Every rank draws a name for itself. Rank 0 answers the names it finds with its own, which prefixes the store: who
    gets an answer to a name it has just drawn has it from a living rank 0. It is done when all ranks have confirmed.

    Raises:
        TimeoutError: a rank has not come.
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
        for other in waiting:
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", own)
        time.sleep(0.02)
        waiting = [other for other in waiting if not store.check([f"confirmed/{own}/{other}"])]
        if waiting and time.monotonic() > end:
            raise TimeoutError(f"Rank(s) {waiting} did not come within {timeout}.")
    return dist.PrefixStore(own, store)
