"""Frozen weights of an mxfp4 checkpoint, held as its files have them: the same codes and exponents, on every layout.

These are the stacked matrices of experts. They are found by what the files hold, adapted or not; all other weights of
such a checkpoint are dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from automodel_trainer.models._transformers import mark_loaded, places_of
from automodel_trainer.models.files import TensorSlice, slices_of
from automodel_trainer.models.quantization import mxfp4
from automodel_trainer.models.quantization.checkpoint import dense_weights, quantization_of
from automodel_trainer.models.quantization.dense import Mxfp4Weight
from automodel_trainer.models.quantization.quantize import QuantizedWeights, hold_quantized, ignore_in_ddp, laid_out_as
from automodel_trainer.models.quantization.quantized_tensor import QuantizedTensor


class StoredWeights(QuantizedWeights):
    """A module some of whose stacked weights are held as mxfp4. Mixed in by `hold_as_stored`.

    While its own forward runs, their names stand for dense weights, unless something else has put another in place.
    Grouped experts (`kernels/experts.py`) compute without it.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shown = [name for name in self.quantized_names if name not in self.__dict__]
        for name in shown:
            weight = self._parameters[name]
            # Python finds this in `__dict__`, and so never asks `nn.Module.__getattr__` for the parameter.
            self.__dict__[name] = weight.get_original_weight() if isinstance(weight, QuantizedTensor) else weight
        try:
            return super().forward(*args, **kwargs)
        finally:
            for name in shown:
                del self.__dict__[name]


def weights_in(model: PreTrainedModel, folder: Path, files: list[Path]) -> set[str]:
    """The names of the parameters of `model` that can be held as the files of an mxfp4 checkpoint have them.

    Raises:
        ValueError: it is no such checkpoint, or the model holds its weights in another shape.
    """
    quantization = quantization_of(folder)
    if found := stored_weights(model, dense_weights(slices_of(files), quantization, folder)):
        return set(found)
    method = None if quantization is None else quantization.get("quant_method")
    what = "is not quantized" if method is None else f"is quantized by {method}"
    if method == mxfp4.SCHEME:
        what = "has no stacked experts that the model holds in the same shape"
    raise ValueError(
        f"lora quantize='mxfp4' holds the experts of an mxfp4 checkpoint as they are, and {folder} {what}. Set "
        "quantize to 'nf4', which rounds weights of any checkpoint to 4 bits, or to null."
    )


def stored_weights(model: PreTrainedModel, tensors: Mapping[str, TensorSlice]) -> dict[str, Mxfp4Weight]:
    """What a checkpoint holds as mxfp4 and the model in the same shape, by the model's names.

    Args:
        model: before it is laid out.
        tensors: from `dense_weights`.
    """
    found = {name: part for name, part in tensors.items() if isinstance(part, Mxfp4Weight)}
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters() if parameter.ndim == 3}
    places = places_of(model, found, converted=False)
    return {place: found[name] for name, place in places.items() if shapes.get(place) == found[name].get_shape()}


def hold_as_stored(model: nn.Module, names: Iterable[str]) -> None:
    """Make `model` (on meta) hold those of these parameters that are frozen as mxfp4 from now on."""
    held: dict[str, tuple[str, ...]] = {}
    for name in names:
        owner, _, key = name.rpartition(".")
        if not model.get_parameter(name).requires_grad:
            held[owner] = (*held.get(owner, ()), key)
    for owner, keys in held.items():
        hold_quantized(model.get_submodule(owner), mxfp4.SCHEME, keys, StoredWeights)
    ignore_in_ddp(model)


def is_held_as_stored(model: nn.Module, name: str) -> bool:
    """Whether `hold_as_stored` has changed the module of this parameter for it."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    return isinstance(module, StoredWeights) and key in module.quantized_names


@torch.no_grad()
def read_as_stored(model: nn.Module, weights: Mapping[str, Mxfp4Weight], device: torch.device) -> None:
    """Read codes and exponents into parameters on meta, of DTensors those of this rank's shard.

    Args:
        model: laid out, or not. A pipeline stage may lack some of the parameters.
        weights: of the files, by the names of parameters.
        device: where they go.

    Raises:
        ValueError: a weight is not sharded along its experts into equal shards.
    """
    for name, meta in list(model.named_parameters()):
        if name in weights:
            owner, _, key = name.rpartition(".")
            parameter = laid_out_as(meta, mxfp4.SCHEME, _Shards(weights[name], meta.dtype, device))
            mark_loaded(parameter, True)
            setattr(model.get_submodule(owner), key, parameter)


class _Shards:
    """The shards of a weight along its first dimension, read when they are asked for."""

    def __init__(self, weight: Mxfp4Weight, dtype: torch.dtype, device: torch.device) -> None:
        self.weight, self.dtype, self.device = weight, dtype, device

    def __call__(self, index: int, count: int) -> QuantizedTensor:
        experts, *matrix = self.weight.get_shape()
        size = experts // count
        codes, exponents = (t.to(self.device) for t in self.weight.stored(index * size, (index + 1) * size))
        return QuantizedTensor(mxfp4.parts(codes, exponents), mxfp4.SCHEME, (size, *matrix), self.dtype)
