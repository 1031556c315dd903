"""How the side channel's store takes many ranks: `python benchmarks/fan_in.py --ranks 16 64 256 1024`, on a CPU.

Every rank is a thread with a connection of its own to one store in another process. In a round each rank does what
`Watch` does in a second (is the run over, my place, is there a verdict), then rank 0 reads the places of all. The
threads share one interpreter, so a round costs more than it would with as many machines: an upper limit of the store's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from automodel_trainer.callbacks.side_channel import SideChannel

ROUNDS = 5


def serve(world_size: int, pipe: Connection) -> None:
    """Rank 0's store; rank 0 itself is asked from the other process."""
    channel = SideChannel(0, world_size, "127.0.0.1", None)
    pipe.send(channel.port)
    pipe.recv()


def beat(channel: SideChannel) -> None:
    """A second of one rank, as `Watch` spends it."""
    channel.has_told("bye", 0)
    place = {"beat": 1, "step": 1, "phase": "backward", "silent": 0.1, "collective": "", "line": ""}
    channel.tell("place", place)
    channel.verdict()


def measure(ranks: int) -> tuple[float, float, float]:
    """Seconds to connect all ranks, for a round of all, and for rank 0 to read all places; of rounds the median."""
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(ranks, there))
    server.start()
    port = here.recv()
    with ThreadPoolExecutor(ranks) as threads:
        began = time.perf_counter()
        channels = list(threads.map(lambda rank: SideChannel(rank, ranks, "127.0.0.1", port), range(ranks)))
        connected = time.perf_counter() - began
        rounds, reads = [], []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            list(threads.map(beat, channels))
            rounds.append(time.perf_counter() - began)
            began = time.perf_counter()
            assert len(channels[0].told("place")) == ranks
            reads.append(time.perf_counter() - began)
    here.send(None)
    server.join()
    return connected, sorted(rounds)[ROUNDS // 2], sorted(reads)[ROUNDS // 2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256])
    for number in parser.parse_args().ranks:
        connect, one_round, read = measure(number)
        times = f"connect {connect:.2f} s, round {one_round * 1e3:.0f} ms, read {read * 1e3:.1f} ms"
        print(f"{number} ranks: {times}", flush=True)
