"""Merge a LoRA adapter with its base model, or the model of a checkpoint, into one plain model folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from automodel_trainer.checkpoint.export import conversion_groups
from automodel_trainer.checkpoint.safetensors_stream import SafetensorsWriter
from automodel_trainer.checkpoint.sources import is_adapter, model_folder, new_folder
from automodel_trainer.checkpoint.trained_base import other_base
from automodel_trainer.checkpoint.weight_stream import (
    Advance,
    Convert,
    Header,
    Weights,
    header_of,
    progress,
    write_stream,
)
from automodel_trainer.distributed.agreement import on_all_ranks, rank
from automodel_trainer.models._transformers import converts_weights, original_weight_names, tied_weight_names
from automodel_trainer.models.build import empty_model
from automodel_trainer.models.files import INDEX_NAME, resolve_folder
from automodel_trainer.models.lora import LoRAConfig, adapters, apply_lora, lora_of, untied_head
from automodel_trainer.models.lora.adapter_files import read_config, read_tensors, save_adapter, trained_tensors
from automodel_trainer.models.lora.config_changes import CHANGES_NAME, as_arguments, read_changes
from automodel_trainer.models.lora.functional import adapted_weight, merged_linear
from automodel_trainer.models.lora.initialize import principal_factors
from automodel_trainer.models.lora.layers import Adapter
from automodel_trainer.models.sidecars import copy_sidecars

_TOKENIZER_FILES = (
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*",
    "processor_config.json", "*preprocessor_config.json",
)  # fmt: skip
_KEPT = 4  # number of updates of fused weights to keep: the parts of a fused weight are not adjacent in the files


def merge(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    *,
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
) -> Path:
    """Write a plain model folder from a checkpoint, or from a base model and an adapter, one tensor at a time.

    Base and adapter are added in fp32 and rounded once. An adapter that was trained on a 4-bit base is merged into the
    base in full precision. The config is the base's with the values that the adapter was trained with. The weights of a
    checkpoint are written under the names that the model has on the Hub.

    Args:
        source: a checkpoint (of a model or an adapter), or the folder or Hub id of a model or of an adapter in PEFT's
            format.
        output: the folder to write. It appears when it is complete.
        base: folder or Hub id of the base model. None: the one that the adapter's config names.
        dtype: dtype of floating-point weights; None keeps the dtypes of the base.
        max_shard_size: maximum size of a weight file. With an adapter, the files are split like the base's instead.
        trust_remote_code: run model code that comes with the base.

    Returns:
        The folder.

    Raises:
        ValueError: adapter and base do not fit, one of them is damaged, or `output` exists.
    """
    folder = model_folder(source)
    if is_adapter(folder):
        return _merge_adapter(folder, Path(output), base, dtype, trust_remote_code)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is neither an adapter nor a model: it has no adapter_config.json and no config.json. Give the "
            "folder of one."
        )
    if base is not None:
        raise ValueError(f"{source} is a full model, not an adapter: leave out the base {base}.")
    with new_folder(Path(output)) as target:
        model = empty_model(folder, trust_remote_code)
        weights = Weights(folder, dense=model.dtype)
        groups, convert = _conversion(model, weights)
        options: dict[str, Any] = {"max_shard_size": max_shard_size, "groups": groups, "convert": convert}
        write_stream(weights, target, dtype=dtype, title="merging", **options)
        copy_sidecars(model, target, source=folder, dtype=dtype)
    return Path(output)


def _conversion(model: PreTrainedModel, weights: Weights) -> tuple[list[list[str]] | None, Convert | None]:
    """How to convert names in memory to names on the Hub. (None, None) if the weights have the Hub's names already."""
    meta = weights.meta()
    if not converts_weights(model) or not meta.keys() <= model.state_dict().keys():
        return None, None
    return conversion_groups(model, meta), partial(original_weight_names, model)


def _merge_adapter(
    adapter: Path, output: Path, base: str | os.PathLike[str] | None, dtype: torch.dtype | None, trust_remote_code: bool
) -> Path:
    config = read_config(adapter)
    named = base or config.get("base_model_name_or_path")
    if not named:
        raise ValueError(f"The config of adapter {adapter} names no base model: give the base model (--base).")
    source, changes = resolve_folder(named), read_changes(adapter)
    if (other := other_base(adapter, source)) is not None:
        rank_zero_warn(
            f"{other}: unless they differ by rounding alone, the merged model is not the one that was trained."
        )
    model = empty_model(source, trust_remote_code, config.get("task_type"), changes)
    model = apply_lora(model, LoRAConfig(adapter=str(adapter)))
    updates = Updates(model, read_tensors(adapter), dtype)
    with new_folder(output) as target:
        kept = dtype or getattr(torch, str(model.config.dtype).removeprefix("torch."))
        weights = Weights(source, dense=model.dtype)
        if head := untied_head(model):
            (on_disk,) = original_weight_names(model, {head.source: model.get_parameter(head.source).detach()})
            weights.show_again(on_disk, head.name)
        updates.check(set(weights.header), source)
        with progress("merging", sum(file.stat().st_size for file in weights.files)) as advance:
            for file, header in weights.by_file().items():
                _merge_file(weights, header, target / file.name, updates, advance)
        _write_index(source, target, weights)
        copy_sidecars(model, target, source=source, dtype=kept)
        # The adapter's own tokenizer or processor is the one that was trained with. It replaces the base's.
        for pattern in _TOKENIZER_FILES:
            for file in resolve_folder(adapter).glob(pattern):
                shutil.copyfile(file, target / file.name)
    if changes:
        rank_zero_info(f"config.json has what the adapter was trained with ({CHANGES_NAME}): {as_arguments(changes)}")
    return output


class Updates:
    """Computes the merged value of each tensor in the base model's files.

    Args:
        model: the base model on meta, with the adapter's layers.
        tensors: the adapter's tensors by name.
        dtype: dtype of floating-point weights on disk; None keeps the base's.
    """

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        config = lora_of(model)
        assert config is not None
        self.model, self.tensors, self.dtype, self.config = model, tensors, dtype, config
        self.source_of: dict[str, str] = {}  # name on disk -> the parameter in memory that it is, or is part of
        self.adapters: dict[str, Adapter] = {}
        self.whole: set[str] = set()  # parameters that are one tensor of the same shape on disk
        self._deltas: dict[str, dict[str, Tensor]] = {}
        for adapter in adapters(model):
            name = adapter.target + (".weight" if adapter.is_linear else "")
            self.adapters[name] = adapter
            self._trace(name)
        for name in self._replaced():
            self._trace(name)

    def _replaced(self) -> list[str]:
        tied = tied_weight_names(self.model)
        names = [name for name in trained_tensors(self.model) if name in self.tensors and ".lora_" not in name]
        for name in names:
            other = tied.get(name)
            if other in names and not torch.equal(self.tensors[name], self.tensors[other]):
                raise ValueError(
                    f"The adapter has different values for {name} and {other}, which the base model ties. A folder of "
                    "this model cannot hold both: use the adapter without merging it."
                )
        return [name for name in names if tied.get(name) not in names]

    def _trace(self, name: str) -> None:
        parameter = self.model.get_parameter(name)
        parts = original_weight_names(self.model, {name: parameter.detach()})
        self.source_of |= dict.fromkeys(parts, name)
        if len(parts) == 1 and next(iter(parts.values())).shape == parameter.shape:
            self.whole.add(name)

    def check(self, on_disk: set[str], base: Path) -> None:
        """Check that the base's files have every tensor that the adapter updates.

        Args:
            on_disk: names of the tensors in the base's files.
            base: the base's folder, for the error message.

        Raises:
            ValueError: a tensor is missing, or the adapter brought a module that the base never had.
        """
        missing = self.source_of.keys() - on_disk
        if new := sorted(name for name in missing if self.source_of[name] not in self.adapters):
            raise ValueError(
                f"{base} has no {new[0]}, which the adapter trained as a whole: the adapter brought a head that its "
                "base never had, and merging keeps the base's files. Load base and adapter with PEFT and save that."
            )
        if missing:
            raise ValueError(
                f"{base} has no {sorted(missing)[0]}, which the adapter updates: it is another base model, or its "
                "files use names that we cannot map. Give the base model that the adapter was trained on."
            )

    def apply(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The merged tensor `name` in `dtype`, its dtype on disk; `tensor` is that of the base.

        Raises:
            ValueError: the base is quantized, or an adapter of this kind cannot be merged into fused weights.
        """
        source = self.source_of.get(name)
        if source is None:
            return tensor.to(dtype)
        # Adding to codes, without their scales, would make noise.
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(f"The base's {name} is {tensor.dtype}: merge into an unquantized base model.")
        adapter = self.adapters.get(source)
        if adapter is None:
            parts = original_weight_names(self.model, {source: self.tensors[source]})
            return parts[name].to(dtype)
        if source in self.whole and adapter.is_linear:
            weight = tensor.float().mT if adapter.is_transposed else tensor.float()
            merged = merged_weight(adapter, self._factors(adapter), weight, self.config.init)
            return (merged.mT.contiguous() if adapter.is_transposed else merged).to(dtype)
        # Both need the whole weight: DoRA its rows' norms, PiSSA its principal components.
        if adapter.magnitude is not None or self.config.init == "pissa":
            raise ValueError(
                f"{source} is stored in several parts, and DoRA and PiSSA adapters cannot be merged into parts. Use "
                "the adapter without merging it."
            )
        return (tensor.float() + self._delta(source, adapter)[name]).to(dtype)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape on disk of the merged tensor `name`; that of the base is `shape`.

        They differ for embeddings that were resized and saved with the adapter.
        """
        source = self.source_of.get(name)
        if source is None or source in self.adapters or source not in self.whole:
            return shape
        return tuple(self.tensors[source].shape)

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype on disk of a tensor with the given dtype."""
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def _factors(self, adapter: Adapter) -> dict[str, Tensor]:
        names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        found = {name: self.tensors.get(adapter.peft_prefix + name) for name in names}
        return {name: tensor.float() for name, tensor in found.items() if tensor is not None}

    def _delta(self, source: str, adapter: Adapter) -> dict[str, Tensor]:
        """The update of a fused weight, split like the weight in the base's files."""
        if source not in self._deltas:
            factors = self._factors(adapter)
            zero = torch.zeros(self.model.get_parameter(source).shape)
            a, b = factors["lora_A.weight"], factors["lora_B.weight"]
            update = adapted_weight(zero, a, b, adapter.scaling, adapter.has_transposed_experts)
            while len(self._deltas) >= _KEPT:
                self._deltas.pop(next(iter(self._deltas)))
            self._deltas[source] = original_weight_names(self.model, {source: update})
        return self._deltas[source]


def merged_weight(adapter: Adapter, factors: Mapping[str, Tensor], weight: Tensor, init: str) -> Tensor:
    """Merge the weight of a linear layer with its adapter.

    Args:
        adapter: the adapter.
        factors: its tensors by name: A `[rank, in]`, B `[out, rank]` and, for DoRA, the magnitude `[out]`.
        weight: the base weight, fp32 `[out, in]`.
        init: how the adapter was initialized.

    Returns:
        fp32 `[out, in]`.
    """
    a, b, scaling = factors["lora_A.weight"], factors["lora_B.weight"], adapter.scaling
    if init == "pissa":  # PiSSA subtracts the initial factors from the base before training
        first_a, first_b = principal_factors(weight, adapter.rank, scaling)
        weight = weight - scaling * first_b @ first_a
    return merged_linear(weight, a, b, scaling, factors.get("lora_magnitude_vector"))


def _merge_file(weights: Weights, header: Header, target: Path, updates: Updates, advance: Advance) -> None:
    planned = {name: (updates.kept_dtype(dtype), updates.shape(name, shape)) for name, (dtype, shape) in header.items()}
    with SafetensorsWriter(target, planned) as writer:
        for name, (dtype, _) in planned.items():
            tensor = weights.exact(name)
            writer.write(name, updates.apply(name, tensor, dtype))
            advance(tensor.nbytes)


def _write_index(source: Path, target: Path, weights: Weights) -> None:
    if (source / INDEX_NAME).is_file():
        index = json.loads((source / INDEX_NAME).read_text())
        index["weight_map"] = {name: file.name for name, file in weights.file_of.items() if name in weights.header}
        sizes = (t for file in target.glob("*.safetensors") for t in header_of(file).values())
        total = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in sizes)
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        (target / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def merge_and_save(
    model: PreTrainedModel,
    base: Path | None,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Merge the adapter of a model in training into its base model. Collective.

    Args:
        model: a model with adapters, on any layout.
        base: the folder that its frozen weights were read from.
        folder: the folder to write. It appears when it is complete.
        dtype: dtype of the weights on disk; None keeps the base's.
        tokenizer: a tokenizer to save with the model.
        trust_remote_code: run model code that comes with the base.

    Returns:
        The folder.

    Raises:
        ValueError: the model has no adapter, there is no base folder on disk, or `folder` exists.
    """
    if lora_of(model) is None:
        raise ValueError("The model has no LoRA adapter to merge: use save_pretrained without merging.")
    if base is None:
        raise ValueError(
            "The base model was created in memory, so there are no files to merge into: save it to a folder and train "
            "from there."
        )
    folder = Path(folder)
    scratch = folder.with_name(f".{folder.name}-adapter")

    def write() -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        merge(scratch, folder, base, dtype, trust_remote_code=trust_remote_code)

    try:
        save_adapter(model, scratch)
        on_all_ranks(write if rank() == 0 else lambda: None, folder)
    finally:
        if rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder
