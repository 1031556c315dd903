"""`amt launch`: write a file that a scheduler takes. It starts nothing.

amt launch --to slurm --config run.yaml --nodes 4 --gpus 8 --time 04:00:00 --out job.sh
amt launch --to kubernetes --config run.yaml --nodes 4 --gpus 8 --volume claim
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from automodel_trainer.checkpoint.remote import is_remote
from automodel_trainer.tools.launch import kubernetes, skypilot, slurm, torchrun
from automodel_trainer.tools.launch.check import check
from automodel_trainer.tools.launch.job import SHARED, Job, max_time_below, name_of, seconds_of

WRITERS: dict[str, Callable[[Job], str]] = {
    "kubernetes": kubernetes.write,
    "skypilot": skypilot.write,
    "slurm": slurm.write,
    "torchrun": torchrun.write,
}
_FRESH = ("kubernetes", "skypilot")  # a restarted machine there has an empty disk


def main(argv: Sequence[str]) -> None:
    """The command line: print a file, or write it to `--out`.

    Raises:
        ValueError: the run does not fit the machines, or an option does not fit the kind of file.
    """
    parser = argparse.ArgumentParser(
        prog="amt launch",
        description="Write a complete, commented file for a scheduler: how ranks meet, what happens when time "
        "runs out, a node is lost or a rank dies, shared caches, the container. It starts nothing.",
        epilog="All other options are those of `amt fit`, and go into the file: --trainer.max_steps 1000, …",
    )
    parser.add_argument("--to", required=True, choices=sorted(WRITERS), help="the kind of file")
    parser.add_argument("--config", required=True, type=Path, help="the YAML of the run")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs, so ranks, on each machine (default: 8)")
    parser.add_argument("--out", type=Path, help="write the file here; without it, print it")
    parser.add_argument("--name", help="of the job (default: the last part of the run's folder)")
    parser.add_argument("--time", help="the queue's limit, HH:MM:SS or D-HH:MM:SS; the run's max_time lies below it")
    parser.add_argument("--container", metavar="IMAGE", help="a container image with automodel-trainer in it")
    parser.add_argument("--cache", metavar="DIR", help="the folder of caches; all nodes must see it")
    parser.add_argument("--volume", help=f"kubernetes, skypilot: a claim or volume, mounted at {SHARED} on every node")
    parser.add_argument("--partition", help="slurm: the partition")
    parser.add_argument("--account", help="slurm: the account")
    parser.add_argument("--gpu-type", default="H100", help="skypilot: the accelerator (default: H100)")
    own, rest = parser.parse_known_args(list(argv))
    _check_options(own)
    text = WRITERS[own.to](_job(own, rest))
    if own.out is None:
        print(text, end="")
    else:
        own.out.write_text(text, encoding="utf-8")
        print(f"Written to {own.out}.")


def _check_options(own: argparse.Namespace) -> None:
    if own.to == "skypilot" and own.time is not None:
        raise ValueError("--time is a queue's limit, and SkyPilot has none. Leave it out, or give --trainer.max_time.")
    for name in ("partition", "account"):
        value = getattr(own, name)
        if value is not None and not re.fullmatch(r"[\w.,@+:-]+", value):
            raise ValueError(f"--{name} {value!r} is no name of Slurm: letters, digits and . , @ + : - are allowed.")


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Meanwhile, Lightning logs errors alone."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _job(own: argparse.Namespace, rest: list[str]) -> Job:
    with _quiet_lightning():  # which GPUs this machine has does not matter
        checked = check(own.config, rest, own.nodes, own.gpus)
    root = _root(own, checked.root)
    seconds = None if own.time is None else seconds_of(own.time)
    max_time = None if seconds is None else max_time_below(seconds)
    if checked.seconds is not None and seconds is not None and checked.seconds < 0.9 * seconds:
        max_time = None  # the run's own is shorter
    for note in checked.notes:
        print(f"amt launch: {note}.", file=sys.stderr)
    return Job(
        config=own.config.resolve(),
        name=name_of(own.name or Path(root).name),
        nodes=own.nodes,
        gpus=own.gpus,
        root=root,
        options=tuple(rest),
        layout=checked.layout,
        notes=checked.notes,
        seconds=seconds,
        max_time=max_time,
        image=own.container,
        cache=own.cache,
        partition=own.partition,
        account=own.account,
        gpu_type=own.gpu_type,
        volume=own.volume,
    )


def _root(own: argparse.Namespace, root: str) -> str:
    """The run's folder on the machines that run it.

    Raises:
        ValueError: it would be lost with the machine.
    """
    if is_remote(root) or own.to not in _FRESH:
        return root
    if own.volume is None:
        raise ValueError(
            f"default_root_dir={root!r} would be lost with the machine it lies on. Give --volume NAME, which is "
            f"mounted at {SHARED}, or --trainer.default_root_dir s3://bucket/run."
        )
    path = Path(root)
    if not path.is_absolute():
        return f"{SHARED}/{path.as_posix()}"
    if not path.is_relative_to(SHARED):
        raise ValueError(
            f"default_root_dir={root!r} does not lie on the volume, which is mounted at {SHARED}. Give a relative "
            f"folder, or one below {SHARED}."
        )
    return root
