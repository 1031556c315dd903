"""A module's weights as a plain Hugging Face folder, written by all ranks together.

Every tensor is written whole, by one rank, into a file of its own share. Shards would save the gathering (about what
one forward pass under FSDP2 gathers), but nothing except DCP could read them. So every checkpoint's `model/` is a
folder that `from_pretrained` loads as it is, no rank waits for a merge, and nothing is written twice. Optimizer state,
twice the size and of no use to other programs, stays in shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from automodel_trainer.checkpoint.agreement import rank, world_size
from automodel_trainer.models._transformers import tied_weight_names
from automodel_trainer.models.adapters import load_adapter, save_adapter
from automodel_trainer.models.lora import lora_of

MAX_FILE_BYTES = 2 * 2**30  # a file is serialised in host memory before it is written
MIN_FILE_BYTES = 64 * 2**20


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, in the module's order; of tied ones only the first (or the source).

    Raises:
        ValueError: extra state that is not a tensor.
    """
    tied = set(tied_weight_names(module)) if isinstance(module, PreTrainedModel) else set()
    state: Mapping[str, Any] = module.state_dict(keep_vars=True)  # the tensors themselves: ties show as identity
    shared = {id(value) for name, value in state.items() if name not in tied}
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} in the module's state_dict is a {type(value).__name__}, not a tensor: a checkpoint holds "
                "tensors only. Keep such state in `on_save_checkpoint`, as numbers, strings, lists and dicts."
            )
        if id(value) in seen or (name in tied and id(value) in shared):
            continue
        seen.add(id(value))
        tensors[name] = value.detach()
    return tensors


def whole(tensor: Tensor) -> Tensor:
    """The full tensor: a DTensor is gathered over its mesh (collective)."""
    if not isinstance(tensor, DTensor):
        return tensor
    # With CPU offload the shards lie in host memory, where NCCL cannot gather them.
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]


def save_weights(module: nn.Module, folder: Path) -> None:
    """Write `model-0000i-of-0000n.safetensors` and their index. Collective; one tensor is gathered at a time.

    Of a model with adapters only these are written, as PEFT has them: the base is where it came from.
    """
    if lora_of(module) is not None:
        save_adapter(module, folder)
        return
    tensors = named_tensors(module)
    total = sum(tensor.nbytes for tensor in tensors.values())
    limit = min(MAX_FILE_BYTES, max(MIN_FILE_BYTES, total // world_size()))
    files = split_into_files(tensors, limit)
    owned = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if (files[name] - 1) % world_size() == rank():
            # What was gathered leaves the device at once; what lies there anyway leaves it file by file.
            owned[name] = (full.cpu() if full is not tensor else full).contiguous()
    # In this mode DCP writes each rank's tensors as they are, and the index over all of them.
    dcp.save(owned, storage_writer=HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files))


def split_into_files(tensors: Mapping[str, Tensor], limit: int) -> dict[str, int]:
    """Number each tensor's file, from 1: files in the order of the tensors, no larger than `limit` if that can be."""
    files: dict[str, int] = {}
    index, size = 1, 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > limit:
            index, size = index + 1, 0
        files[name] = index
        size += tensor.nbytes
    return files


@torch.no_grad()
def load_weights(module: nn.Module, folder: Path) -> None:
    """Read the weights into the module's tensors in place, each rank its own shards. Collective.

    Raises:
        ValueError: names or shapes differ from the module's.
    """
    if lora_of(module) is not None:
        load_adapter(module, folder)
        return
    tensors = named_tensors(module)
    reader = HuggingFaceStorageReader(str(folder))
    saved = {name: entry.size for name, entry in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    _check(tensors, saved, module, folder)
    dcp.load(dict(tensors), storage_reader=reader)


def _check(tensors: Mapping[str, Tensor], saved: Mapping[str, Any], module: nn.Module, folder: Path) -> None:
    kind = type(module).__name__
    if missing := tensors.keys() - saved.keys():
        raise ValueError(f"{folder} has no weights for {some(missing)} of {kind}: it is a checkpoint of another model.")
    if unknown := saved.keys() - tensors.keys():
        raise ValueError(f"{folder} holds {some(unknown)}, which {kind} does not have: a checkpoint of another model.")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(saved[name]):
            raise ValueError(
                f"{name} has the shape {list(saved[name])} in {folder} but {list(tensor.shape)} in {kind}: build the "
                "model from the config the checkpoint was trained with."
            )


def some(names: Iterable[str]) -> str:
    """A few of the names, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")
