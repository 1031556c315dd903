"""Check a run before a file is written for it: its options, its layout on these GPUs, its batch, its folders."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from automodel_trainer.callbacks.preemption import preemption_of
from automodel_trainer.checkpoint.remote import is_remote
from automodel_trainer.data import MicroBatchDataModule
from automodel_trainer.data.option_checks import check_global_batch
from automodel_trainer.distributed.mesh import ParallelDims
from automodel_trainer.lightning_cli import build
from automodel_trainer.strategies import MeshStrategy
from automodel_trainer.strategies.expert.plan import check_ep
from automodel_trainer.strategies.inner_parallel import InnerParallelStrategy

# A file is written on a machine without the GPUs.
_HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1"]
_RESUMES = ("auto", "last", "last-whole")


@dataclass(frozen=True)
class Checked:
    """A run that fits its machines.

    Attributes:
        root: its `default_root_dir`.
        layout: its sizes, in words.
        seconds: its own time limit; None: it has none.
        notes: what a user should look at.
    """

    root: str
    layout: str
    seconds: float | None
    notes: tuple[str, ...]


def check(config: Path, options: list[str], nodes: int, gpus: int) -> Checked:
    """Build a run's parts as `amt fit` does, and compare its sizes with the machines.

    Args:
        config: the YAML.
        options: further options of `amt fit`.
        nodes, gpus: machines, and GPUs on each.

    Raises:
        ValueError: there is no such file, the layout or the batch does not fit, or the run would begin at the same
            checkpoint at every start.
    """
    if not config.is_file():
        raise ValueError(f"--config {config}: there is no such file.")
    for name, size in (("--nodes", nodes), ("--gpus", gpus)):
        if size < 1:
            raise ValueError(f"{name} {size} must be at least 1.")
    given = _ckpt_path(config, options)
    if given not in (None, *_RESUMES):
        raise ValueError(
            f"ckpt_path={given!r} would be taken again at every start, and what was trained since be lost. Leave it "
            f"out: the file resumes by --ckpt_path auto. Allowed: {', '.join(_RESUMES)}."
        )
    trainer, module, data = build(["--config", str(config), *options, *_HERE])
    notes = [
        f"{option} is {path}, a path of the machine that wrote this. Every node must have it there"
        for option, path in local_files(module, data).items()
    ]
    layout = "one layout of Lightning"
    if isinstance(trainer.strategy, MeshStrategy):
        layout, more = _check_layout(trainer.strategy, data, nodes, gpus)
        notes += more
    preemption = preemption_of(trainer)
    limit = None if preemption is None or preemption.limit is None else preemption.limit.limit
    return Checked(str(trainer.default_root_dir), layout, limit, tuple(notes))


def _check_layout(strategy: MeshStrategy, data: Any, nodes: int, gpus: int) -> tuple[str, list[str]]:
    world = nodes * gpus
    dims = strategy.requested_dims
    if not dims.fits(world):
        given = " × ".join(f"{name}={size}" for name, size in dims.axes.items() if size not in (1, -1))
        near = ", ".join(f"--nodes {n} --gpus {g}" for n, g in _sizes_that_fit(dims, nodes, gpus))
        raise ValueError(
            f"{given} does not fit {nodes} × {gpus} = {world} GPUs: the product of all sizes must be {world} (-1 takes "
            f"what is left). Sizes that work: {near}."
        )
    resolved = dims.resolve(world)
    if isinstance(strategy, InnerParallelStrategy) and strategy.sizes_are_open:
        return "sizes chosen at the start", []
    ep = getattr(strategy, "ep", 1)
    if ep not in (1, "auto"):
        check_ep(ep, None, resolved.dp_shard * resolved.cp * resolved.tp)
    if isinstance(data, MicroBatchDataModule) and data.global_batch_size is not None:
        ranks = resolved.dp_replicate * resolved.dp_shard * strategy.replicas
        check_global_batch(data.global_batch_size, data.micro_batch_size, ranks)
    notes = []
    if strategy.replicas > 1:
        notes.append(
            f"This starts one of {strategy.replicas} replica groups: start it {strategy.replicas} times, beside one "
            "torchft_lighthouse (docs/fault_tolerance.md)"
        )
    if resolved.tp > gpus:
        notes.append(f"tp={resolved.tp} spans nodes of {gpus} GPUs, and its traffic is the largest of all axes")
    return resolved.describe().replace(" × ", " x "), notes


def _sizes_that_fit(dims: ParallelDims, nodes: int, gpus: int) -> list[tuple[int, int]]:
    """The three numbers of nodes and GPUs per node nearest to these that a layout fits on."""
    most = max(4 * nodes, math.prod(size for size in vars(dims).values() if size > 0))
    pairs = [(n, g) for n in range(1, most + 1) for g in range(1, gpus + 1) if dims.fits(n * g)]
    return sorted(pairs, key=lambda pair: (abs(pair[0] * pair[1] - nodes * gpus), -pair[1]))[:3]


def _ckpt_path(config: Path, options: list[str]) -> str | None:
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    given = content.get("ckpt_path") if isinstance(content, dict) else None
    for word, following in zip(options, [*options[1:], ""]):
        name, equals, value = word.partition("=")
        if name == "--ckpt_path":
            given = value if equals else following
    return given


def local_files(module: pl.LightningModule, data: Any) -> dict[str, str]:
    """The files and folders of this machine that a run reads, by option."""
    named = [(f"data.{name}", getattr(data, name, None)) for name in ("train", "validation")]
    named += [("model.model", module.hparams.get("model"))]
    paths = {option: value for option, value in named if isinstance(value, (str, os.PathLike))}
    return {option: str(path) for option, path in paths.items() if not is_remote(path) and Path(path).exists()}
