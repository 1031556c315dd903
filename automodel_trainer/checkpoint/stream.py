"""A model's whole weights one by one, under the names of its checkpoint: for an inference engine, say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from automodel_trainer.checkpoint.export import conversion_groups
from automodel_trainer.checkpoint.weights import named_tensors
from automodel_trainer.models._transformers import converts_weights, original_weight_names
from automodel_trainer.models.lora import adapter_names, adapters, lora_of
from automodel_trainer.models.lora.adapter_files import PREFIX, trained_tensors
from automodel_trainer.models.lora.functional import adapted_weight, merged_linear
from automodel_trainer.models.lora.initialize import whole
from automodel_trainer.models.lora.layers import dense
from automodel_trainer.models.stage_names import WholeTensors, of_all_stages, pipeline_of


class WeightInfo(NamedTuple):
    """What a receiver must know of a tensor before it arrives."""

    shape: torch.Size
    dtype: torch.dtype


@torch.no_grad()
def stream_weights(
    model: PreTrainedModel, dtype: torch.dtype | None = None, *, merge_adapters: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield `(name in the checkpoint, whole tensor)` for every weight of a model on any layout. Collective.

    Every rank gets every tensor, on its device. Only the tensors that are converted together (the experts of a layer)
    are held at a time. All ranks must take the same number of items. A tensor may be the model's own memory: do not
    change it, and copy it to keep it.

    Args:
        model: the model, sharded or whole, with adapters or without.
        dtype: of floating-point weights; None keeps that of each weight.
        merge_adapters: of a model with adapters, yield the weights with the adapters added, in fp32 and rounded once
            (a base in 4 bits is first read back from its codes). False yields the adapters alone, under PEFT's names.
    """
    streamed = _Streamed(model, merge_adapters)
    for group in streamed.groups():
        gathered = {name: streamed.merged(name) for name in group}
        for name, tensor in streamed.named(gathered).items():
            yield name, _cast(tensor, dtype)


@torch.no_grad()
def weight_info(
    model: PreTrainedModel, dtype: torch.dtype | None = None, *, merge_adapters: bool = True
) -> dict[str, WeightInfo]:
    """The names, shapes and dtypes of what `stream_weights` yields with the same arguments, in its order. Collective.

    Nothing is gathered.
    """
    streamed = _Streamed(model, merge_adapters)
    info = {}
    for group in streamed.groups():
        for name, tensor in streamed.named({name: streamed.meta[name] for name in group}).items():
            info[name] = WeightInfo(tensor.shape, _cast(tensor, dtype).dtype)
    return info


class _Factors(NamedTuple):
    """What is added to an adapted weight: names of the factors, and how."""

    a: str
    b: str
    magnitude: str | None
    scaling: float
    transposed: bool
    linear: bool


class _Streamed:
    """The tensors of a model, how they are converted together, and which adapters are added to them."""

    def __init__(self, model: PreTrainedModel, merge_adapters: bool) -> None:
        self.model = model
        self.alone = not merge_adapters and lora_of(model) is not None
        trained = trained_tensors(model) if lora_of(model) is not None else {}
        own: dict[str, Tensor] = {} if self.alone else named_tensors(model)
        of_adapters = adapter_names(model)
        own = {name: tensor for name, tensor in own.items() if name not in of_adapters}
        self.whole = WholeTensors(model, {**own, **trained} if self.alone else {**trained, **own}, whole)
        names = of_all_stages(model, dict.fromkeys(trained if self.alone else own))
        self.meta = {
            name: torch.empty(shape, dtype=kind, device="meta")
            for name, (shape, kind) in self.whole.shapes.items()
            if name in names
        }
        self.factors = {} if self.alone else of_all_stages(model, _factors_of(model))

    def groups(self) -> list[list[str]]:
        """The names that are gathered together."""
        return [[name] for name in self.meta] if self.alone else conversion_groups(self.model, self.meta)

    def named(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the names, and in the shapes, of the checkpoint."""
        if self.alone:
            return {PREFIX + name: tensor for name, tensor in tensors.items()}
        return original_weight_names(self.model, tensors) if converts_weights(self.model) else tensors

    def merged(self, name: str) -> Tensor:
        """The whole tensor, with its adapter added, on every rank. Collective."""
        weight, found = self._get(name), self.factors.get(name)
        if found is None:
            return weight
        a, b = self._get(found.a).float(), self._get(found.b).float()
        exact = weight.float()
        if not found.linear:
            return adapted_weight(exact, a, b, found.scaling, found.transposed).to(weight.dtype)
        magnitude = None if found.magnitude is None else self._get(found.magnitude).float()
        merged = merged_linear(exact.mT if found.transposed else exact, a, b, found.scaling, magnitude)
        return (merged.mT.contiguous() if found.transposed else merged).to(weight.dtype)

    def _get(self, name: str) -> Tensor:
        """The whole tensor on every rank; of a pipeline, the ranks of the first stage send it to the others."""
        full, pipeline = self.whole.get(name), pipeline_of(self.model)
        if pipeline is None:
            assert full is not None
            return dense(full)
        shape, kind = self.whole.shapes[name]
        full = torch.empty(shape, dtype=kind, device=pipeline.device) if full is None else dense(full)
        full = full.to(pipeline.device).contiguous()
        dist.broadcast(full, group=pipeline.group, group_src=0)
        return full


def _factors_of(model: PreTrainedModel) -> dict[str, _Factors]:
    """The adapters of this rank's part of a model, by the name of the weight that they are added to."""
    found = {}
    for adapter in adapters(model):
        prefix = adapter.peft_prefix
        found[adapter.target + (".weight" if adapter.is_linear else "")] = _Factors(
            f"{prefix}lora_A.weight",
            f"{prefix}lora_B.weight",
            f"{prefix}lora_magnitude_vector" if adapter.magnitude is not None else None,
            adapter.scaling,
            adapter.is_transposed or adapter.has_transposed_experts,
            adapter.is_linear,
        )
    return found


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
