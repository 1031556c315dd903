"""Two machines on this one: network namespaces with a cable between them. Root on Linux can make them."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from automodel_trainer.tools.launch import shell
from automodel_trainer.tools.launch.job import Job

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
    """On machine `number` of two, what the torchrun of `amt launch` does for two ranks, which are forked."""
    with open(f"/run/netns/{names[number]}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {names[number]}")
    os.environ["GLOO_SOCKET_IFNAME"] = CABLE
    elastic_launch(_as_launched(number), function)(*args)


def _as_launched(number: int) -> LaunchConfig:
    """The settings of a file that `amt launch` has written, and its environment."""
    job = Job(Path("run.yaml"), "nodes", len(ADDRESSES), 2, "run")
    exports, command = _torchrun_of(shell.torchrun(job, "fit", "run", ADDRESSES[0]))
    os.environ.update(exports)
    config, _, _ = config_from_args(get_args_parser().parse_args(command))
    config.start_method, config.monitor_interval = "fork", 0.1
    config.local_addr = ADDRESSES[number]  # both have one host name
    config.rdzv_configs |= {"is_host": number == 0, "keep_alive_interval": 1}  # a lost agent is noticed in 3 s, not 15
    return config


def _torchrun_of(lines: list[str]) -> tuple[dict[str, str], list[str]]:
    exports = dict(line.split()[1].split("=") for line in lines if line.startswith("export "))
    text = " ".join(line.rstrip("&\\") for line in lines[lines.index(next(filter(_starts, lines))) :])
    words = shlex.split(text.partition(" fit")[0])
    return exports, words[1:]


def _starts(line: str) -> bool:
    return line.startswith("torchrun ")
