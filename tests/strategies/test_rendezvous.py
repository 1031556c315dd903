"""A store that has been used before: whoever comes now meets only who comes now."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from automodel_trainer.distributed.rendezvous import fresh_store

SHORT = timedelta(seconds=5)


def attempt(port: int, order: tuple[int, ...]) -> list[bytes]:
    """Three ranks that come in `order`, leave something for the others, and read what rank 0 left."""
    seen: dict[int, bytes] = {}

    def rank(number: int, name: str) -> None:
        server = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=SHORT, wait_for_workers=False)
        store = fresh_store(server, number, 3, SHORT)
        if number == 0:
            store.set("address", name)
        seen[number] = store.get("address")

    threads = [threading.Thread(target=rank, args=(number, f"attempt {order}")) for number in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [seen[number] for number in range(3)]


def test_an_attempt_reads_nothing_of_the_one_before() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        assert attempt(server.port, order) == [f"attempt {order}".encode()] * 3


def test_a_rank_of_an_attempt_that_died_is_not_taken_for_one_of_the_next() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    server.set("hello/2", "left by the dead")
    with pytest.raises(TimeoutError, match=r"Rank\(s\) \[1, 2\] did not join"):
        fresh_store(server, 0, 3, timedelta(seconds=0.2))
    assert attempt(server.port, (1, 2, 0)) == [b"attempt (1, 2, 0)"] * 3
