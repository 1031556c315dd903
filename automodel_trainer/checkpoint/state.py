"""Write and read a whole training state: weights, optimizer, Lightning's loops and callbacks, random numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from automodel_trainer.checkpoint.agreement import on_all_ranks, rank, world_size
from automodel_trainer.checkpoint.codec import decode, encode
from automodel_trainer.checkpoint.folder import check_checkpoint, prepare, publish, temporary, write_json, write_text
from automodel_trainer.checkpoint.optimizer import load_optimizers, save_optimizers
from automodel_trainer.checkpoint.rng import fresh_rng_state, rng_state, set_rng_state
from automodel_trainer.checkpoint.weights import load_weights, save_weights
from automodel_trainer.models.sidecars import copy_sidecars

RNG_KEY = "automodel_trainer.rng"  # in the loaded dict: this rank's generators
CONFIG_KEY = "automodel_trainer.config"  # in the dict to save: the text of the run's config.yaml
_IN_TENSOR_FILES = ("state_dict", "optimizer_states", RNG_KEY, CONFIG_KEY)


def save_checkpoint(
    folder: Path, lightning_checkpoint: dict[str, Any], module: nn.Module, optimizers: Sequence[Optimizer]
) -> None:
    """Write a checkpoint folder; on failure nothing of it stays. Collective.

    ```
    model/            a Hugging Face folder: config, tokenizer, whole tensors in safetensors, for any program
    optimizer/        shards of the optimizer state in safetensors; parameter groups in groups.json
    trainer.json      Lightning's state: loops, callbacks, schedules, hyperparameters; versions and layout
    rank-00000.json   each rank's own: random generators, position of its loader
    config.yaml       the run's config, if it has one
    manifest.json     every file and its length, written last
    ```

    Args:
        folder: where to; on a file system that all ranks share. An older checkpoint of that name is replaced.
        lightning_checkpoint: Lightning's state, without weights and optimizer state.
        module: what is trained: its state-dict keys are the checkpoint's.
        optimizers: those whose state is saved.

    Raises:
        ValueError: state that neither JSON nor safetensors can hold; the message names it.
        CheckpointError: a file could not be written, on whichever rank. Raised on every rank.
    """
    target = temporary(folder)
    shared, own = on_all_ranks(partial(_describe, lightning_checkpoint, module), folder)
    first = rank() == 0
    try:
        on_all_ranks(lambda: prepare(folder) if first else None, folder)
        on_all_ranks(partial(save_weights, module, target / "model"), folder)
        on_all_ranks(partial(save_optimizers, module, optimizers, target / "optimizer"), folder)
        on_all_ranks(partial(_write_state, target, shared, own, lightning_checkpoint.get(CONFIG_KEY), module), folder)
        on_all_ranks(lambda: _publish(target, folder) if first else None, folder)
    except (OSError, ValueError):
        if first:
            shutil.rmtree(target, ignore_errors=True)
        raise


def load_checkpoint(folder: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Read a checkpoint, whatever layout wrote it, into `module` and `optimizers` as they are laid out now. Collective.

    Without optimizers (evaluation) only weights are read. The random generators go on where they were if there are as
    many ranks as then; else they start anew from a seed that follows from the step.

    Returns:
        what `save_checkpoint` was given, with empty "state_dict" and "optimizer_states".

    Raises:
        ValueError: the checkpoint is damaged (the file is named), or one of another model or optimizer.
    """
    on_all_ranks(lambda: check_checkpoint(folder) if rank() == 0 else None, folder)
    description = on_all_ranks(lambda: _read(folder / "trainer.json"), folder)
    on_all_ranks(partial(load_weights, module, folder / "model"), folder)
    if optimizers:
        on_all_ranks(partial(load_optimizers, module, optimizers, folder / "optimizer"), folder)
    checkpoint: dict[str, Any] = {**description["lightning"], "state_dict": {}, "optimizer_states": []}
    same_ranks = description["world_size"] == world_size()
    own = on_all_ranks(lambda: _read(folder / _rank_file(rank() if same_ranks else 0)), folder)
    _set_loader_state(checkpoint, own["loaders"])
    if not same_ranks:
        own["rng"] = fresh_rng_state(checkpoint.get("global_step", 0), rank())
        rank_zero_info(
            f"{folder} was written by {description['world_size']} rank(s) and is read by {world_size()}: weights, "
            "optimizer and data go on as they were, random numbers (dropout) start from a new seed."
        )
    set_rng_state(own["rng"])
    checkpoint[RNG_KEY] = own["rng"]
    return checkpoint


def _describe(checkpoint: dict[str, Any], module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """What rank 0 writes for all, and what this rank writes for itself."""
    state = {key: value for key, value in checkpoint.items() if key not in _IN_TENSOR_FILES}
    shared = {
        "world_size": world_size(),
        "layout": _layout(module),
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, lightning)},
        "lightning": encode(state),
    }
    return shared, {"rng": encode(rng_state()), "loaders": encode(_loader_state(checkpoint), "loops.combined_loader")}


def _write_state(target: Path, shared: Any, own: Any, config: str | None, module: nn.Module) -> None:
    if not target.is_dir():
        raise OSError(f"{target} is not there on rank {rank()}: checkpoints need a file system that all ranks share")
    write_json(target / _rank_file(rank()), own)
    if rank() != 0:
        return
    write_json(target / "trainer.json", shared)
    if config is not None:
        write_text(target / "config.yaml", config)
    if isinstance(module, PreTrainedModel):
        copy_sidecars(module, target / "model")


def _publish(target: Path, folder: Path) -> None:
    lacking = [name for name in map(_rank_file, range(world_size())) if not (target / name).is_file()]
    if lacking:
        raise OSError(f"{lacking} of other ranks cannot be seen: checkpoints need a file system that all ranks share")
    publish(target, folder)


def _loader_state(checkpoint: dict[str, Any]) -> Any:
    """Lightning saves rank 0's position for every rank; a loader may well stand elsewhere on another."""
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    return fit_loop.get("state_dict", {}).get("combined_loader")


def _set_loader_state(checkpoint: dict[str, Any], loaders: Any) -> None:
    if loaders is not None:
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = loaders


def _layout(module: nn.Module) -> dict[str, int]:
    """The mesh that parameters lie on, for information."""
    mesh = next((p.device_mesh for p in module.parameters() if isinstance(p, DTensor)), None)
    names = () if mesh is None else mesh.mesh_dim_names or ()
    return {name: mesh.size(dim) for dim, name in enumerate(names)} if mesh is not None else {}


def _rank_file(number: int) -> str:
    return f"rank-{number:05d}.json"


def _read(file: Path) -> Any:
    return decode(json.loads(file.read_text()))
