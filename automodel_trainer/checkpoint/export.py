"""Weights out: a sharded model as a Hugging Face folder that any program loads."""

from __future__ import annotations

import json
import re
import shutil
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
from automodel_trainer.distributed.stage_names import WholeTensors
from automodel_trainer.models._transformers import converts_weights, original_weight_names
from automodel_trainer.models.files import INDEX_NAME
from automodel_trainer.models.lora import lora_of
from automodel_trainer.models.lora.adapter_files import save_adapter
from automodel_trainer.models.sidecars import copy_sidecars, is_weight_file


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
    """Write a model as a folder for `from_pretrained`: safetensors, config, tokenizer. Collective over all ranks.

    Of a model with adapters only these are written, and the tokenizer: a folder for PEFT's `from_pretrained`.

    One tensor is gathered at a time, and rank 0 holds one file's worth of them. Tied weights are written once. Where
    the model's checkpoints on the Hub have other names and shapes than the model in memory, theirs are written.

    Args:
        model: the model, laid out in any way.
        folder: where to. Files of an older export in it are replaced, others stay.
        tokenizer: saved in place of the source's where it differs.
        source: the folder the model came from, whose other files are copied; by default what the model's config says.
        dtype: of floating-point weights on disk; None keeps each as it is trained.
        max_shard_size: largest weight file, in bytes or as "5GB".

    Raises:
        CheckpointError: a file could not be written (on every rank); an older export is then still there.
    """
    folder = Path(folder)
    if lora_of(model) is not None:
        on_all_ranks(partial(save_adapter, model, folder, dtype), folder)
        if rank() == 0 and tokenizer is not None:
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


class _ShardWriter:
    """Takes tensors as they come and writes each file once it has all of its own.

    A failed write is kept and raised by `finish`: the other ranks go on gathering until then.
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
        except Exception as error:  # safetensors reports a full disk as an exception of its own
            self.error = error if isinstance(error, OSError) else OSError(str(error))

    def finish(self) -> None:
        if self.error is not None:
            raise self.error
        assert not self.waiting, "every planned tensor has been added"
        if self.plan.is_sharded:
            index = {"metadata": self.plan.metadata, "weight_map": self.plan.tensor_to_filename}
            (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _nothing() -> None:
    """What ranks other than 0 do while rank 0 works with files."""


def _prepare(target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)  # a crashed export
    target.mkdir(parents=True)


def _kept(full: Tensor | None, keep: bool) -> Tensor:
    """The gathered tensor on the CPU, or nothing where it is not written."""
    return full.cpu() if keep and full is not None else torch.empty(0)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _planned(model: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What will be on disk, on meta."""
    converted = _meta(tensors)
    if converts_weights(model):
        converted = original_weight_names(model, converted)
    return {name: _cast(tensor, dtype) for name, tensor in converted.items()}


def _meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}


def conversion_groups(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Tensors that must be converted together: the smallest groups that give what converting all at once gives."""
    alone = [[name] for name in tensors]
    if not converts_weights(model):
        return alone
    meta = _meta(tensors)
    expected = _shapes(original_weight_names(model, meta))
    for groups in (alone, list(_by_block(tensors))):
        try:
            parts = [original_weight_names(model, {name: meta[name] for name in group}) for group in groups]
        except Exception:  # a conversion that lacks its other half may fail in any way
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
    # The folder may hold more than an older export (a repository, say): only weights that are now stale go.
    for file in folder.iterdir():
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", file.name) and is_weight_file(file):
            file.unlink()
    for file in [file for file in target.rglob("*") if file.is_file()]:
        place = folder / file.relative_to(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    shutil.rmtree(target)
