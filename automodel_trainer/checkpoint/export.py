"""Export a sharded model as a Hugging Face folder that any program can load."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from automodel_trainer.checkpoint.weights import named_tensors, whole
from automodel_trainer.distributed.agreement import on_all_ranks, rank
from automodel_trainer.models._transformers import converts_weights, original_weight_names
from automodel_trainer.models.files import INDEX_NAME
from automodel_trainer.models.lora import lora_of
from automodel_trainer.models.lora.adapter_files import save_adapter
from automodel_trainer.models.lora.config_changes import CHANGES_NAME, as_arguments, read_changes
from automodel_trainer.models.sidecars import copy_sidecars, is_weight_file
from automodel_trainer.models.stage_names import WholeTensors


@torch.no_grad()
def export_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model as a folder for `from_pretrained`: safetensors, config and tokenizer. Collective over all ranks.

    If the model has adapters, only the adapters and the tokenizer are written: a folder for PEFT's `from_pretrained`.
    A warning names what the config says unlike that of the base, which PEFT loads without it.

    Tensors are gathered one at a time. Rank 0 holds the tensors of one file. Tied weights are written once. If the
    model's checkpoints on the Hub use other names and shapes than the model in memory, those of the Hub are written.

    Args:
        model: the model, on any layout.
        folder: the folder to write. Files of an older export in it are replaced, others stay.
        tokenizer: saved instead of the source's tokenizer if it differs.
        source: the folder that the model came from. Its other files are copied. None: look it up in the config.
        dtype: dtype of floating-point weights on disk; None keeps the dtype of each weight.
        max_shard_size: maximum size of a weight file, in bytes or as text such as "5GB".

    Raises:
        CheckpointError: a file could not be written. Raised on every rank; an older export stays intact.
    """
    folder = Path(folder)
    if lora_of(model) is not None:
        on_all_ranks(partial(save_adapter, model, folder, dtype), folder)
        if rank() == 0:
            _warn_of_changes(model, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        return
    target = folder.with_name(folder.name + ".tmp")
    on_all_ranks(partial(_prepare, target) if rank() == 0 else _nothing, folder)
    tensors = WholeTensors(model, named_tensors(model), whole)
    meta = {name: torch.empty(shape, dtype=kind, device="meta") for name, (shape, kind) in tensors.shapes.items()}
    writer = _ShardWriter(target, _planned(model, meta, dtype), max_shard_size) if rank() == 0 else None
    for group in conversion_groups(model, meta):
        gathered = {name: _kept(tensors.get(name), writer is not None) for name in group}
        if writer is not None:
            converted = original_weight_names(model, gathered) if converts_weights(model) else gathered
            writer.add({name: _cast(tensor, dtype) for name, tensor in converted.items()})
    try:
        on_all_ranks(writer.finish if writer is not None else _nothing, folder)
        finish = partial(_complete, model, target, folder, tokenizer, source, dtype)
        on_all_ranks(finish if writer is not None else _nothing, folder)
    except (OSError, ValueError):
        if writer is not None:
            shutil.rmtree(target, ignore_errors=True)
        raise


def _warn_of_changes(model: PreTrainedModel, folder: Path) -> None:
    if changes := read_changes(folder):
        warnings.warn(
            f"The adapter in {folder} was trained with a config unlike that of {model.config.name_or_path}: "
            f"{as_arguments(changes)}. amt merge and our from_pretrained apply it ({CHANGES_NAME}). PEFT and "
            "transformers do not read it, and compute something else: give from_pretrained of the base these values.",
            stacklevel=3,
        )


class _ShardWriter:
    """Collects tensors and writes each file when it has all tensors of the file.

    An error is kept until `finish` raises it: until then the other ranks continue to gather, and they need this rank.
    """

    def __init__(self, folder: Path, planned: Mapping[str, Tensor], max_shard_size: int | str) -> None:
        self.folder = folder
        self.plan = split_torch_state_dict_into_shards(dict(planned), max_shard_size=max_shard_size)
        self.waiting: dict[str, dict[str, Tensor]] = {name: {} for name in self.plan.filename_to_tensors}
        self.error: OSError | None = None

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            file = self.plan.tensor_to_filename[name]
            self.waiting[file][name] = tensor.contiguous()
            if len(self.waiting[file]) == len(self.plan.filename_to_tensors[file]):
                self._write(file, self.waiting.pop(file))

    def _write(self, file: str, tensors: dict[str, Tensor]) -> None:
        if self.error is not None:
            return
        try:
            save_file(tensors, self.folder / file, metadata={"format": "pt"})
        except Exception as error:  # safetensors raises its own exception if the disk is full
            self.error = error if isinstance(error, OSError) else OSError(str(error))

    def finish(self) -> None:
        if self.error is not None:
            raise self.error
        assert not self.waiting, "every planned tensor has been added"
        if self.plan.is_sharded:
            index = {"metadata": self.plan.metadata, "weight_map": self.plan.tensor_to_filename}
            (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _nothing() -> None:
    """The action of ranks other than 0 while rank 0 works with files."""


def _prepare(target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)  # left by an export that crashed
    target.mkdir(parents=True)


def _kept(full: Tensor | None, keep: bool) -> Tensor:
    """The gathered tensor on the CPU; an empty tensor on ranks that do not write."""
    return full.cpu() if keep and full is not None else torch.empty(0)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _planned(model: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors that will be on disk, on meta."""
    converted = _meta(tensors)
    if converts_weights(model):
        converted = original_weight_names(model, converted)
    return {name: _cast(tensor, dtype) for name, tensor in converted.items()}


def _meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}


def conversion_groups(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of tensors that must be converted together, for example the experts of a layer.

    We try each tensor alone, then the tensors of each block, then all. The first grouping that gives the same result as
    converting all tensors at once is returned.
    """
    alone = [[name] for name in tensors]
    if not converts_weights(model):
        return alone
    meta = _meta(tensors)
    expected = _shapes(original_weight_names(model, meta))
    for groups in (alone, list(_by_block(tensors))):
        try:
            parts = [original_weight_names(model, {name: meta[name] for name in group}) for group in groups]
        except Exception:  # a conversion may fail in any way if some of its tensors are missing
            continue
        if {name: shape for part in parts for name, shape in _shapes(part).items()} == expected:
            return groups
    return [list(tensors)]


def _by_block(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    blocks: dict[str, list[str]] = {}
    for name in tensors:
        numbered = re.match(r".*?\.\d+\.", name)
        blocks.setdefault(numbered.group() if numbered else name, []).append(name)
    yield from blocks.values()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _complete(
    model: PreTrainedModel,
    target: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    source: Path | None,
    dtype: torch.dtype | None,
) -> None:
    copy_sidecars(model, target, source=source, tokenizer=tokenizer, dtype=dtype)
    if not folder.exists():
        target.rename(folder)
        return
    # The folder may hold more than an older export (it may be a repository): remove only weights that are now stale.
    for file in folder.iterdir():
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", file.name) and is_weight_file(file):
            file.unlink()
    for file in [file for file in target.rglob("*") if file.is_file()]:
        place = folder / file.relative_to(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    shutil.rmtree(target)
