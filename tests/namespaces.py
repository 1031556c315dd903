"""Two machines on this one: network namespaces with a cable between them. Root on Linux can make them."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "cable"  # the name of a machine's end
CLONE_NEWNET = 0x40000000


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def machines() -> Iterator[list[str]]:
    """The names of two namespaces that see each other and nothing else; skips the test where they cannot be made."""
    names = [f"amt-{os.getpid()}-{number}" for number in range(2)]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("-n", names[0], "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", names[1])
            for name, address in zip(names, ADDRESSES):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
                for device in ("lo", CABLE):
                    _ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine makes no network namespaces: {error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def agent(names: list[str], number: int, function: Callable[..., Any], *args: Any) -> None:
    """On machine `number` of two, what `torchrun --nnodes 2 --nproc-per-node 2` does, with ranks that are forked."""
    with open(f"/run/netns/{names[number]}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {names[number]}")
    os.environ["GLOO_SOCKET_IFNAME"] = CABLE
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=2,
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
        run_id="nodes",
        local_addr=ADDRESSES[number],
        rdzv_backend="c10d",
        rdzv_endpoint=f"{ADDRESSES[0]}:29511",
        rdzv_configs={"is_host": number == 0, "timeout": 120},
    )
    elastic_launch(config, function)(*args)
