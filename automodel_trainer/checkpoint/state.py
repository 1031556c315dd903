"""Write and read a whole training state: weights, optimizer, Lightning's loops and callbacks, random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
import transformers
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from automodel_trainer.checkpoint.codec import decode, encode
from automodel_trainer.checkpoint.folder import abandon, prepare, publish, temporary
from automodel_trainer.checkpoint.host_copies import Copy, keep
from automodel_trainer.checkpoint.manifest import check_checkpoint, damage_named, read_json
from automodel_trainer.checkpoint.optimizer import OptimizerStates, load_optimizers, stage_optimizers
from automodel_trainer.checkpoint.record import Entry, to_json, write_text
from automodel_trainer.checkpoint.rng import fresh_rng_state, rng_state, set_rng_state
from automodel_trainer.checkpoint.weights import Weights, load_weights, stage_weights
from automodel_trainer.distributed.agreement import gather, on_all_ranks, rank, world_size
from automodel_trainer.models.sidecars import copy_sidecars

RNG_KEY = "automodel_trainer.rng"  # in the loaded dict: this rank's generators
CONFIG_KEY = "automodel_trainer.config"  # in the dict to save: the text of the run's config.yaml
_IN_TENSOR_FILES = ("state_dict", "optimizer_states", RNG_KEY, CONFIG_KEY)


@dataclass
class Snapshot:
    """This rank's share of a checkpoint: all that it holds, as it was at one moment."""

    weights: Weights
    optimizers: OptimizerStates
    files: dict[str, str]
    module: nn.Module | None

    def write(self, target: Path) -> dict[str, Entry]:
        """Write into `target`, which is there already; returns the entries of the files. Not collective."""
        if not target.is_dir():
            raise OSError(
                f"{target} is not there on rank {rank()}: checkpoints need a file system that all ranks share"
            )
        written = {name: write_text(target / name, text) for name, text in self.files.items()}
        for part, content in (("model", self.weights), ("optimizer", self.optimizers)):
            written.update({f"{part}/{name}": entry for name, entry in content.write(target / part).items()})
        if isinstance(self.module, PreTrainedModel):
            copy_sidecars(self.module, target / "model")
        return written


Mirror = Callable[[Path, dist.ProcessGroup | None], None]
"""What is done with a checkpoint once it is whole, on all ranks: a copy elsewhere. Raises CheckpointError."""


def save_checkpoint(
    folder: Path,
    lightning_checkpoint: dict[str, Any],
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    mirror: Mirror | None = None,
) -> None:
    """Write a checkpoint folder; on failure nothing of it stays. Collective.

    ```
    model/            a Hugging Face folder: config, tokenizer, whole tensors in safetensors, for any program
    optimizer/        shards of the optimizer state in safetensors; parameter groups in groups.json
    trainer.json      Lightning's state: loops, callbacks, schedules, hyperparameters; versions and layout
    rank-00000.json   each rank's own: random generators, position of its loader
    config.yaml       the run's config, if it has one
    manifest.json     every file, its length and its checksum, written last
    ```

    Args:
        folder: where to; on a file system that all ranks share. An older checkpoint of that name is replaced.
        lightning_checkpoint: Lightning's state, without weights and optimizer state.
        module: what is trained: its state-dict keys are the checkpoint's.
        optimizers: those whose state is saved.
        mirror: called when the checkpoint is whole.

    Raises:
        ValueError: state that neither JSON nor safetensors can hold; the message names it.
        CheckpointError: a file could not be written, on whichever rank. Raised on every rank.
    """
    write_snapshot(stage(folder, lightning_checkpoint, module, optimizers), folder, mirror=mirror)


def stage(
    folder: Path,
    lightning_checkpoint: dict[str, Any],
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    copy: Copy = keep,
) -> Snapshot:
    """Take all that a checkpoint holds. Collective; arguments and errors as in `save_checkpoint`.

    Args:
        copy: makes a copy in host memory that training does not change; by default tensors are left where they are.
    """
    files = on_all_ranks(partial(_texts, lightning_checkpoint, module), folder)
    weights = on_all_ranks(partial(stage_weights, module, copy), folder)
    states = on_all_ranks(partial(stage_optimizers, module, optimizers, copy), folder)
    return Snapshot(weights, states, files, module if rank() == 0 else None)


def write_snapshot(
    snapshot: Snapshot, folder: Path, group: dist.ProcessGroup | None = None, mirror: Mirror | None = None
) -> None:
    """Write every rank's snapshot; on failure nothing of it stays. Collective over `group` (of CPUs; None: default).

    Raises:
        CheckpointError, ValueError: as in `save_checkpoint`.
    """
    target = temporary(folder)
    first = rank() == 0
    try:
        on_all_ranks(lambda: prepare(folder) if first else None, folder, group)
        written = on_all_ranks(partial(snapshot.write, target), folder, group)
        all_written = gather(written, group)
        on_all_ranks(lambda: _publish(target, folder, all_written) if first else None, folder, group)
    except (OSError, ValueError):
        if first:
            abandon(target)
        raise
    if mirror is not None:
        mirror(folder, group)


def load_checkpoint(folder: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Read a checkpoint, whatever layout wrote it, into `module` and `optimizers` as they are laid out now. Collective.

    Without optimizers (evaluation) only weights are read. The random generators go on where they were if there are as
    many ranks as then; else they start anew from a seed that follows from the step.

    Returns:
        what `save_checkpoint` was given, with empty "state_dict" and "optimizer_states".

    Raises:
        ValueError: the checkpoint is damaged (the file is named), or one of another model or optimizer.
    """
    # Each rank reads a share of the files: what is damaged is found before anything is loaded.
    on_all_ranks(lambda: check_checkpoint(folder, part=rank(), parts=world_size()), folder)
    lightning_state, ranks = on_all_ranks(lambda: _read_trainer(folder / "trainer.json"), folder)
    on_all_ranks(partial(load_weights, module, folder / "model"), folder)
    if optimizers:
        on_all_ranks(partial(load_optimizers, module, optimizers, folder / "optimizer"), folder)
    checkpoint: dict[str, Any] = {**lightning_state, "state_dict": {}, "optimizer_states": []}
    same_ranks = ranks == world_size()
    own = on_all_ranks(lambda: _read_rank(folder / _rank_file(rank() if same_ranks else 0), checkpoint), folder)
    if not same_ranks:
        own = fresh_rng_state(checkpoint.get("global_step", 0), rank())
        set_rng_state(own)
        rank_zero_info(
            f"{folder} was written by {ranks} rank(s) and is read by {world_size()}: weights, optimizer and data go on "
            "as they were, random numbers (dropout) start from a new seed."
        )
    checkpoint[RNG_KEY] = own
    return checkpoint


def _read_trainer(file: Path) -> tuple[dict[str, Any], int]:
    """Lightning's state, and how many ranks wrote it."""
    description = read_json(file)
    with damage_named(file):
        return dict(decode(description["lightning"], file)), int(description["world_size"])


def _read_rank(file: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Set the random generators to a rank's, which are returned, and put the position of its loader in its place."""
    own = read_json(file)
    with damage_named(file, ValueError):
        generators, loaders = decode(own["rng"], file), decode(own["loaders"], file)
        set_rng_state(generators)
        if loaders is not None:
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = loaders
    return generators


def _texts(checkpoint: dict[str, Any], module: nn.Module) -> dict[str, str]:
    """The text files that this rank writes: its own, and on rank 0 those for all."""
    state = {key: value for key, value in checkpoint.items() if key not in _IN_TENSOR_FILES}
    shared = {
        "world_size": world_size(),
        "layout": _layout(module),
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, lightning)},
        "lightning": encode(state),
    }
    own = {"rng": encode(rng_state()), "loaders": encode(_loader_state(checkpoint), "loops.combined_loader")}
    files = {_rank_file(rank()): to_json(own)}
    if rank() == 0:
        files["trainer.json"] = to_json(shared)
        if checkpoint.get(CONFIG_KEY) is not None:
            files["config.yaml"] = checkpoint[CONFIG_KEY]
    return files


def _publish(target: Path, folder: Path, written: Sequence[dict[str, Entry]]) -> None:
    lacking = [name for name in map(_rank_file, range(world_size())) if not (target / name).is_file()]
    if lacking:
        raise OSError(f"{lacking} of other ranks cannot be seen: checkpoints need a file system that all ranks share")
    publish(target, folder, {name: entry for entries in written for name, entry in entries.items()})


def _loader_state(checkpoint: dict[str, Any]) -> Any:
    """Lightning saves rank 0's position for every rank; a loader may well stand elsewhere on another."""
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    return fit_loop.get("state_dict", {}).get("combined_loader")


def _layout(module: nn.Module) -> dict[str, int]:
    """The mesh that parameters lie on, for information."""
    mesh = next((p.device_mesh for p in module.parameters() if isinstance(p, DTensor)), None)
    names = () if mesh is None else mesh.mesh_dim_names or ()
    return {name: mesh.size(dim) for dim, name in enumerate(names)} if mesh is not None else {}


def _rank_file(number: int) -> str:
    return f"rank-{number:05d}.json"
