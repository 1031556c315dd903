"""Write a module's weights as a plain Hugging Face folder. All ranks write together.

Each tensor is gathered and written whole by one rank, and each file by one rank. Shards would avoid the gathering
(about as much as one forward under FSDP2 gathers), but only DCP could read them. This way `from_pretrained` can load
the `model/` folder of every checkpoint directly, no merge is needed, and nothing is written twice. Optimizer state is
twice as large and of no use to other programs, so it stays in shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from automodel_trainer.checkpoint.edited_weights import check_tensors, holding
from automodel_trainer.checkpoint.host_copies import Copy, keep
from automodel_trainer.checkpoint.record import Entry, write_json, write_safetensors
from automodel_trainer.distributed.agreement import gather, rank, world_size
from automodel_trainer.models._transformers import tied_weight_names
from automodel_trainer.models.files import INDEX_NAME
from automodel_trainer.models.lora import lora_of
from automodel_trainer.models.lora.adapter_files import CONFIG_NAME as ADAPTER_CONFIG
from automodel_trainer.models.lora.adapter_files import WEIGHTS_NAME as ADAPTER_WEIGHTS
from automodel_trainer.models.lora.adapter_files import gather_adapter, load_adapter
from automodel_trainer.models.lora.config_changes import CHANGES_NAME, config_changes
from automodel_trainer.nn.text import listed
from automodel_trainer.nn.uneven import detached, gather_uneven, is_uneven

MAX_FILE_BYTES = 2 * 2**30  # small enough to distribute the files over the ranks
MIN_FILE_BYTES = 64 * 2**20


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, in the module's order.

    Of tied tensors only one is included: the source for Hugging Face models, otherwise the first. Tensors that a
    Hugging Face model shares though its config does not say so are all included: readers would draw the others anew.

    Raises:
        ValueError: the state dict has an entry that is not a tensor.
    """
    tied = set(tied_weight_names(module)) if isinstance(module, PreTrainedModel) else set()
    state: Mapping[str, Any] = module.state_dict(keep_vars=True)  # not detached, so tied tensors are identical objects
    shared = {id(value) for name, value in state.items() if name not in tied}
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} in the module's state_dict is a {type(value).__name__}, but the weights of a checkpoint must "
                "be tensors. Save such state in `on_save_checkpoint`, as numbers, strings, lists and dicts."
            )
        known = id(value) in seen and (name in tied or not isinstance(module, PreTrainedModel))
        if known or (name in tied and id(value) in shared):
            continue
        tensor = detached(value)
        tensors[name] = tensor.clone() if id(value) in seen else tensor  # files take no shared memory
        seen.add(id(value))
    return tensors


def whole(tensor: Tensor) -> Tensor:
    """The tensor in its full shape. A DTensor is gathered over its mesh (collective); a plain one is not changed."""
    if is_uneven(tensor):
        return gather_uneven(tensor)
    if not isinstance(tensor, DTensor):
        return tensor
    # With CPU offload the shards lie in host memory, where NCCL cannot gather them.
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]


@dataclass
class WeightSnapshot:
    """This rank's share of a module's weights.

    Attributes:
        files: maps file names to whole tensors by name.
        index: content of the index file, on rank 0.
        adapter: the adapter's config, on rank 0, if the model has adapters.
        changes: what the model's config says unlike that of its base, on rank 0, if the model has adapters.
    """

    files: dict[str, dict[str, Tensor]]
    index: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    changes: dict[str, Any] | None = None

    def write(self, folder: Path) -> dict[str, Entry]:
        """Write the files into `folder` and return their entries. Not collective."""
        folder.mkdir(exist_ok=True)
        metadata = {"format": "pt"}
        written = {name: write_safetensors(folder / name, tensors, metadata) for name, tensors in self.files.items()}
        if self.index is not None:
            written[INDEX_NAME] = write_json(folder / INDEX_NAME, self.index)
        if self.adapter is not None:
            written[ADAPTER_CONFIG] = write_json(folder / ADAPTER_CONFIG, self.adapter)
        if self.changes:
            written[CHANGES_NAME] = write_json(folder / CHANGES_NAME, self.changes)
        return written


def snapshot_weights(
    module: nn.Module, copy: Copy = keep, edited: Mapping[str, Tensor] | None = None
) -> WeightSnapshot:
    """Gather the weights, one tensor at a time, on the ranks that write them. Collective.

    If the model has adapters, only these are taken, in PEFT's format, because the base model does not change. Ranks
    may hold different tensors (pipeline stages). Each tensor is written by a rank that holds it.

    Args:
        module: the module to save.
        copy: copies tensors to host memory, so that training can change the originals. The default makes no copy.
        edited: weights to write instead of the module's (a hook changed them): all of them, by name. Of a model with
            adapters, frozen weights may be missing.

    Raises:
        ValueError: `edited` holds what is not a tensor, or changes what a checkpoint of adapters does not hold.
    """
    if edited is not None:
        check_tensors(edited)
    if lora_of(module) is not None:
        with holding(module, edited or {}):
            tensors, config = gather_adapter(module)  # these are copies already, of a few MB
        first = rank() == 0
        if not first:
            return WeightSnapshot({})
        return WeightSnapshot({ADAPTER_WEIGHTS: tensors}, adapter=config, changes=config_changes(module))
    if edited is None:
        return snapshot_tensors(named_tensors(module), copy, "weights")
    aliases = module.state_dict().keys() - named_tensors(module).keys()  # a tied tensor is written once
    kept = {name: value.detach() for name, value in edited.items() if name not in aliases}
    return snapshot_tensors(kept, copy, "weights")


def snapshot_tensors(tensors: Mapping[str, Tensor], copy: Copy, kind: str) -> WeightSnapshot:
    """Gather tensors, one at a time, on the ranks that write them. Collective.

    Args:
        tensors: tensors by name; ranks may hold different ones.
        copy: see `snapshot_weights`.
        kind: begins the names of copies.
    """
    files, total = _plan(tensors)
    count = max((number for number, _ in files.values()), default=0)
    mine: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        number, owner = files[name]
        if owner == rank():
            # A gathered tensor is moved to the host at once, to free device memory. One that was not gathered takes no
            # extra memory and is moved when its file is written.
            taken = copy(f"{kind}/{name}", full) if copy is not keep else full.cpu() if full is not tensor else full
            mine.setdefault(f"model-{number:05d}-of-{count:05d}.safetensors", {})[name] = taken
    if rank() != 0:
        return WeightSnapshot(mine)
    weight_map = {name: f"model-{number:05d}-of-{count:05d}.safetensors" for name, (number, _) in files.items()}
    return WeightSnapshot(mine, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[int, int]], int]:
    """Plan the files of all tensors of all ranks. Collective.

    Returns:
        Maps tensor names to (number of the file from 1, rank that writes it); and the total size in bytes.
    """
    sizes: dict[str, int] = {}
    holders: dict[str, list[int]] = {}
    for number, held in enumerate(gather({name: tensor.nbytes for name, tensor in tensors.items()})):
        sizes.update(held)
        for name in held:
            holders.setdefault(name, []).append(number)
    # About one file per rank, so that all ranks write.
    limit = min(MAX_FILE_BYTES, max(MIN_FILE_BYTES, sum(sizes.values()) // world_size()))
    plan: dict[str, tuple[int, int]] = {}
    last = 0
    for group in _groups(holders):
        numbered = split_into_files({name: sizes[name] for name in group}, limit)
        for name, number in numbered.items():
            owners = holders[name]
            plan[name] = last + number, owners[(last + number - 1) % len(owners)]  # holders take turns
        last += max(numbered.values())
    return plan, sum(sizes.values())


def _groups(holders: Mapping[str, list[int]]) -> list[list[str]]:
    """Group names by the ranks that hold them: one rank must be able to write a whole file."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, ranks in holders.items():
        groups.setdefault(tuple(ranks), []).append(name)
    return list(groups.values())


def split_into_files(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """Assign a file number, from 1, to each tensor, in order. Files are at most `limit` bytes if tensors allow it.

    Args:
        sizes: maps names to sizes in bytes.
        limit: maximum size of a file in bytes. A larger tensor gets a file of its own.
    """
    files: dict[str, int] = {}
    index, size = 1, 0
    for name, nbytes in sizes.items():
        if size and size + nbytes > limit:
            index, size = index + 1, 0
        files[name] = index
        size += nbytes
    return files


@torch.no_grad()
def load_weights(module: nn.Module, folder: Path, strict: bool = True) -> None:
    """Read the weights into the module's tensors in place; each rank reads its own shards. Collective.

    Args:
        module: the module to fill.
        folder: the `model/` folder of a checkpoint.
        strict: whether names must be the same. Otherwise only those that both have are read, with a warning. Adapters
            are always read strictly.

    Raises:
        ValueError: names or shapes differ from the module's.
    """
    if lora_of(module) is not None:
        load_adapter(module, folder)
        return
    tensors = named_tensors(module)
    reader = HuggingFaceStorageReader(str(folder))
    saved = {name: entry.size for name, entry in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    if not strict:
        tensors, saved = _common(tensors, saved, folder)
    for name in _doubles(module) - saved.keys():
        tensors.pop(name, None)
    _check(tensors, saved, module, folder)
    dcp.load(dict(tensors), storage_reader=reader)


def _doubles(module: nn.Module) -> set[str]:
    """Names of tensors that have another name before: checkpoints before 0.2 hold them once."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return names - {name for name, _ in module.named_parameters()}


def _common(
    tensors: dict[str, Tensor], saved: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    everywhere = {name for names in gather(set(tensors)) for name in names}
    for names, what in (
        (everywhere - saved.keys(), "are not in it and keep their values"),
        (saved.keys() - everywhere, "are in it alone and are not read"),
    ):
        if names:
            rank_zero_warn(f"strict_loading=False: {listed(sorted(names))} {what} ({folder}).")
    return {name: t for name, t in tensors.items() if name in saved}, {n: saved[n] for n in saved if n in everywhere}


def _check(tensors: Mapping[str, Tensor], saved: Mapping[str, Any], module: nn.Module, folder: Path) -> None:
    kind = type(module).__name__
    everywhere = {name for names in gather(set(tensors)) for name in names}  # collective, so before any rank raises
    if missing := tensors.keys() - saved.keys():
        raise ValueError(
            f"{folder} has no weights for {listed(sorted(missing))} of {kind}: it is a checkpoint of another model."
        )
    if unknown := saved.keys() - everywhere:
        raise ValueError(
            f"{folder} holds {listed(sorted(unknown))}, which {kind} does not have: it is a checkpoint of another "
            "model."
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(saved[name]):
            raise ValueError(
                f"{name} has the shape {list(saved[name])} in {folder} but {list(tensor.shape)} in {kind}: build the "
                "model from the config that the checkpoint was trained with."
            )
