"""Write and read a whole training state: weights, optimizers, Lightning's loops and callbacks, random generators.

A save has two halves. `take_snapshot` is collective: each rank takes its share of the state, for an async save as a
copy in host memory. `write_snapshot` only writes files, so it can run in a thread beside training.
"""

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
from automodel_trainer.checkpoint.extra import FOLDER as EXTRA
from automodel_trainer.checkpoint.extra import put_back, take_out
from automodel_trainer.checkpoint.folder import abandon, prepare, publish, remove_checkpoint, temporary
from automodel_trainer.checkpoint.host_copies import Copy, keep
from automodel_trainer.checkpoint.hyperparameters import savable_state
from automodel_trainer.checkpoint.manifest import check_checkpoint, damage_named, read_json, read_manifest
from automodel_trainer.checkpoint.optimizer import OptimizerSnapshot, load_optimizers, snapshot_optimizers
from automodel_trainer.checkpoint.places import Place, Share, leave_manifest, place_of
from automodel_trainer.checkpoint.record import Entry, to_json, write_text
from automodel_trainer.checkpoint.rng import fresh_rng_state, rng_state, set_rng_state
from automodel_trainer.checkpoint.saved_weights import SavedWeights
from automodel_trainer.checkpoint.weights import WeightSnapshot, load_weights, snapshot_tensors, snapshot_weights
from automodel_trainer.distributed.agreement import gather, on_all_ranks, rank, world_size
from automodel_trainer.models.sidecars import copy_sidecars

RNG_KEY = "automodel_trainer.rng"  # key in the loaded dict: the state of this rank's random generators
CONFIG_KEY = "automodel_trainer.config"  # key in the dict to save: the text of the run's config.yaml
FOLDER_KEY = "automodel_trainer.folder"  # key in the loaded dict: where it was read from
RUN_KEY = "automodel_trainer.run"  # key in both: the run's settings, and what optimizers and schedules were given
RUN_FOLDER_KEY = "automodel_trainer.run_folder"  # key in the dict to save: the run's folder, and its newest checkpoint
TOKENIZER_KEY = "automodel_trainer.tokenizer"  # key in the dict to save: the tokenizer or processor of the run
_NOT_IN_JSON = ("state_dict", "optimizer_states", RNG_KEY, CONFIG_KEY, FOLDER_KEY, RUN_FOLDER_KEY, TOKENIZER_KEY)


@dataclass
class Snapshot:
    """This rank's share of a checkpoint, as the state was at one moment.

    Attributes:
        weights: its share of the weights.
        optimizers: its share of the optimizer state.
        extra: its share of the tensors in Lightning's state.
        files: maps names of text files to their content.
        module: the module, on rank 0.
        tokenizer: what the run was trained with, if it is not the one in the folder of the model.
    """

    weights: WeightSnapshot
    optimizers: OptimizerSnapshot
    extra: WeightSnapshot | None
    files: dict[str, str]
    module: nn.Module | None
    tokenizer: Any = None

    def write(self, target: Path) -> dict[str, Entry]:
        """Write the files into the existing folder `target`, and return their entries. Not collective.

        Raises:
            OSError: a file could not be written, or this rank does not see `target`.
        """
        if not target.is_dir():
            raise OSError(
                f"{target} does not exist on rank {rank()}: checkpoints need a file system that all ranks share"
            )
        written = {name: write_text(target / name, text) for name, text in self.files.items()}
        for part, content in (("model", self.weights), ("optimizer", self.optimizers), (EXTRA, self.extra)):
            if content is None:
                continue
            written.update({f"{part}/{name}": entry for name, entry in content.write(target / part).items()})
        if isinstance(self.module, PreTrainedModel):
            copy_sidecars(self.module, target / "model", tokenizer=self.tokenizer)
        return written


Mirror = Callable[[Path, dist.ProcessGroup | None, Share | None], None]
"""Copies a complete checkpoint elsewhere: each rank its share. All ranks call it. Raises CheckpointError."""


def save_checkpoint(
    folder: str | Path,
    lightning_checkpoint: dict[str, Any],
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    mirror: Mirror | None = None,
) -> None:
    """Write a checkpoint folder. If that fails, nothing of it stays. Collective.

    ```
    model/            a Hugging Face folder: config, tokenizer, whole tensors in safetensors, for any program
    optimizer/        shards of the optimizer state in safetensors; parameter groups in groups.json
    trainer.json      Lightning's state: loops, callbacks, schedules, hyperparameters; versions and layout
    extra/            large tensors of Lightning's state, such as averaged weights, if there are any
    rank-00000.json   one file per rank: random generators, position of its loader
    config.yaml       the run's config, if it has one
    manifest.json     every file with its size and checksum, written last
    ```

    Args:
        folder: the folder to write, on a file system that all ranks share. An older checkpoint there is replaced.
            With `mirror` nodes may have folders of their own. Of a checkpoint in parts only the manifest stays here.
        lightning_checkpoint: Lightning's state. Without "optimizer_states" it is a checkpoint of weights alone. If its
            "state_dict" is not empty, it is written instead of the module's weights: a hook has changed it.
        module: the module to save. The checkpoint uses its state-dict keys.
        optimizers: the optimizers to save.
        mirror: called when the checkpoint is complete.

    Raises:
        ValueError: neither JSON nor safetensors can hold some state. The message names it.
        CheckpointError: a file could not be written on some rank. Raised on every rank.
    """
    folder = Path(folder)
    write_snapshot(take_snapshot(folder, lightning_checkpoint, module, optimizers), folder, mirror=mirror)


def take_snapshot(
    folder: Path,
    lightning_checkpoint: dict[str, Any],
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    copy: Copy = keep,
) -> Snapshot:
    """Take this rank's share of everything that a checkpoint holds. Collective.

    Args:
        folder: the checkpoint, for error messages.
        lightning_checkpoint: see `save_checkpoint`.
        module: see `save_checkpoint`.
        optimizers: see `save_checkpoint`.
        copy: copies tensors to host memory, so that training can change the originals. The default makes no copy.

    Raises:
        CheckpointError, ValueError: as in `save_checkpoint`.
    """
    state = savable_state({key: value for key, value in lightning_checkpoint.items() if key not in _NOT_IN_JSON})
    state, tensors = take_out(state)
    weights_only = "optimizer_states" not in lightning_checkpoint and not optimizers
    files = on_all_ranks(partial(_texts, lightning_checkpoint, state, module, weights_only), folder)
    edited = lightning_checkpoint.get("state_dict") or None
    weights = on_all_ranks(partial(snapshot_weights, module, copy, edited), folder)
    states = on_all_ranks(partial(snapshot_optimizers, module, optimizers, copy), folder)
    extra = None
    if any(gather(bool(tensors))):
        extra = on_all_ranks(partial(snapshot_tensors, tensors, copy, EXTRA), folder)
    tokenizer = lightning_checkpoint.get(TOKENIZER_KEY)
    return Snapshot(weights, states, extra, files, module if rank() == 0 else None, tokenizer)


def write_snapshot(
    snapshot: Snapshot, folder: Path, group: dist.ProcessGroup | None = None, mirror: Mirror | None = None
) -> None:
    """Write the snapshots of all ranks as a checkpoint. If that fails, nothing of it stays. Collective.

    Args:
        snapshot: this rank's snapshot.
        folder: the checkpoint to write.
        group: the ranks that agree, over their CPUs. None: the default group.
        mirror: called when the checkpoint is complete.

    Raises:
        CheckpointError, ValueError: as in `save_checkpoint`.
    """
    target = temporary(folder)
    first = rank() == 0
    place = Place(tuple(range(world_size())))
    try:
        on_all_ranks(lambda: prepare(folder) if first else None, folder, group)
        if mirror is not None:
            place = place_of(target, group)
            on_all_ranks(lambda: prepare(folder) if place.first and not first else None, folder, group)
        written = on_all_ranks(partial(snapshot.write, target), folder, group)
        all_written = gather(written, group)
        on_all_ranks(lambda: _publish(target, folder, all_written, place) if first else None, folder, group)
    except (OSError, ValueError):
        if place.first:
            abandon(target)
        raise
    if mirror is not None and place.apart:
        _send_parts(mirror, folder, group, place, all_written)
    elif mirror is not None:
        mirror(folder, group, None)


def _send_parts(
    mirror: Mirror, folder: Path, group: dist.ProcessGroup | None, place: Place, written: Sequence[dict[str, Entry]]
) -> None:
    """Copy a checkpoint elsewhere that lies in parts on the disks of several nodes, and keep its manifest alone."""
    first = rank() == 0
    source = folder if 0 in place.ranks else temporary(folder)
    files = {**written[rank()], **(_sidecars(folder, written) if first else {})}
    try:
        mirror(folder, group, Share(source, files))
    except OSError:
        if first:
            remove_checkpoint(folder)
        raise
    finally:
        if place.first and not first:
            abandon(source)
    on_all_ranks(lambda: leave_manifest(folder) if first else None, folder, group)


def _sidecars(folder: Path, written: Sequence[dict[str, Entry]]) -> dict[str, Entry]:
    """The files that no rank has an entry of: what rank 0 copied."""
    files = read_manifest(folder)["files"]
    return {name: entry for name, entry in files.items() if not any(name in entries for entries in written)}


def load_checkpoint(folder: str | Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Read a checkpoint, written on any layout, into `module` and `optimizers` on their current layout. Collective.

    Without optimizers (evaluation), only weights are read. On the same number of ranks, the random generators continue
    where they were. Otherwise they start from a new seed, which depends on the step.

    Args:
        folder: the checkpoint.
        module: the module to fill, in place.
        optimizers: the optimizers to fill, in place.

    Returns:
        The `lightning_checkpoint` given to `save_checkpoint`, with empty "state_dict" and "optimizer_states".

    Raises:
        ValueError: the checkpoint is damaged (the message names the file), or of another model or optimizer.
    """
    folder = Path(folder)
    checkpoint = open_checkpoint(folder)
    on_all_ranks(partial(load_weights, module, folder / "model"), folder)
    if optimizers:
        given = checkpoint.get(RUN_KEY, {}).get("optimizers")
        on_all_ranks(partial(load_optimizers, module, optimizers, folder / "optimizer", given), folder)
    return {**checkpoint, "state_dict": {}, "optimizer_states": []}


def open_checkpoint(folder: Path) -> dict[str, Any]:
    """Check a checkpoint and read everything but the weights and the optimizer state. Collective.

    The random generators continue as `load_checkpoint` says.

    Returns:
        The `lightning_checkpoint` given to `save_checkpoint`. "state_dict" is a `SavedWeights`, which reads a weight
        when it is asked for; "optimizer_states" is empty, and missing if only weights were saved.

    Raises:
        ValueError: the checkpoint is damaged; the message names the file.
    """
    # Each rank checks a share of the files, so damage is found before anything is loaded.
    on_all_ranks(lambda: check_checkpoint(folder, part=rank(), parts=world_size()), folder)
    lightning_state, ranks = on_all_ranks(lambda: _read_trainer(folder), folder)
    checkpoint: dict[str, Any] = {**lightning_state, "state_dict": SavedWeights(folder / "model")}
    checkpoint[FOLDER_KEY] = str(folder)
    same_ranks = ranks == world_size()
    own = on_all_ranks(lambda: _read_rank(folder / _rank_file(rank() if same_ranks else 0), checkpoint), folder)
    if not same_ranks:
        own = fresh_rng_state(checkpoint.get("global_step", 0), rank())
        set_rng_state(own)
        rank_zero_info(
            f"{folder} was written by {ranks} rank(s) and is read by {world_size()}: weights, optimizer and data "
            "continue where they were. Random numbers (dropout) start from a new seed."
        )
    checkpoint[RNG_KEY] = own
    return checkpoint


def read_whole(folder: Path) -> dict[str, Any]:
    """A checkpoint as Lightning's `load_from_checkpoint` reads one: Lightning's state, and all weights on the CPU.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    check_checkpoint(folder)
    return {**_read_trainer(folder)[0], "state_dict": SavedWeights(folder / "model").copy()}


def read_lightning_state(folder: Path) -> dict[str, Any]:
    """Lightning's state in a checkpoint (loops, callbacks, data module) and the run's record (`RUN_KEY`), alone.

    Raises:
        ValueError: the file is damaged.
    """
    return _read_trainer(folder)[0]


def _read_trainer(folder: Path) -> tuple[dict[str, Any], int]:
    """Lightning's state, and the number of ranks that wrote it."""
    file = folder / "trainer.json"
    description = read_json(file)
    with damage_named(file):
        state = put_back(dict(decode(description["lightning"], file)), folder / EXTRA)
        if not description.get("weights_only", False):
            state["optimizer_states"] = []
        return state, int(description["world_size"])


def _read_rank(file: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Restore a rank's random generators and return their state. Put its loader's position into `checkpoint`."""
    own = read_json(file)
    with damage_named(file, ValueError):
        generators, loaders = decode(own["rng"], file), decode(own["loaders"], file)
        set_rng_state(generators)
        if loaders is not None:
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = loaders
    return generators


def _texts(checkpoint: dict[str, Any], state: dict[str, Any], module: nn.Module, weights_only: bool) -> dict[str, str]:
    """The text files that this rank writes: its own, and on rank 0 the shared ones."""
    shared = {
        "world_size": world_size(),
        "layout": _layout(module),
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, lightning)},
        "weights_only": weights_only,
        "lightning": encode(state),
    }
    own = {"rng": encode(rng_state()), "loaders": encode(_loader_state(checkpoint), "loops.combined_loader")}
    files = {_rank_file(rank()): to_json(own, indent=None)}
    if rank() == 0:
        files["trainer.json"] = to_json(shared)
        if checkpoint.get(CONFIG_KEY) is not None:
            files["config.yaml"] = checkpoint[CONFIG_KEY]
    return files


def _publish(target: Path, folder: Path, written: Sequence[dict[str, Entry]], place: Place) -> None:
    lacking = [name for name in map(_rank_file, place.ranks) if not (target / name).is_file()]
    if lacking:
        raise OSError(
            f"rank 0 does not see {lacking} of other ranks: checkpoints need a file system that all ranks share"
        )
    elsewhere = {name for number, entries in enumerate(written) if number not in place.ranks for name in entries}
    publish(target, folder, {name: entry for entries in written for name, entry in entries.items()}, elsewhere)


def _loader_state(checkpoint: dict[str, Any]) -> Any:
    """The position of this rank's loader. Lightning would save rank 0's for all ranks, but it may differ by rank."""
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    return fit_loop.get("state_dict", {}).get("combined_loader")


def _layout(module: nn.Module) -> dict[str, int]:
    """Sizes of the axes of the parameters' mesh, for information only."""
    mesh = next((p.device_mesh for p in module.parameters() if isinstance(p, DTensor)), None)
    names = () if mesh is None else mesh.mesh_dim_names or ()
    return {name: mesh.size(dim) for dim, name in enumerate(names)} if mesh is not None else {}


def _rank_file(number: int) -> str:
    return f"rank-{number:05d}.json"
