"""Tells the weights of a model object from others: those of another object, and those of the folder that it names."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer.models._transformers import converts_weights
from automodel_trainer.models.files import slices_of
from automodel_trainer.nn.samples import sample_of

_PLAIN = ("F32", "F16", "BF16", "F64")  # dtypes in safetensors
_ROUNDING = 2**-7  # of bf16, twice


def values_fingerprint(model: nn.Module, trains: bool) -> str | None:
    """A hash of names, shapes and samples of the values; None if they are not all here as they are.

    It is the same whether a model was loaded in fp32 or in bf16.

    Args:
        model: not laid out yet.
        trains: what is not frozen is left out: the model has its adapters already.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if trains and parameter.requires_grad:
            continue
        if parameter.is_meta or type(parameter.data) is not Tensor:  # sharded, quantized
            return None
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample_of(parameter, torch.bfloat16))
    return digest.hexdigest()[:12]


def unlike_folder(model: PreTrainedModel, folder: Path) -> str | None:
    """A weight of a model object that is another in the folder which it names; None if none is found.

    The first row of each weight is compared, to the rounding of half precision.

    Args:
        model: not laid out yet.
        folder: of a model; what it stores under other names or quantized is not compared.
    """
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if not files or converts_weights(model):
        return None
    stored = slices_of(files)
    for name, parameter in model.named_parameters():
        part = stored.get(name)
        if part is None or part.get_dtype() not in _PLAIN or part.get_shape() != list(parameter.shape):
            continue
        if parameter.is_meta or type(parameter.data) is not Tensor or not parameter.ndim:
            continue
        one, other = part[:1].float(), parameter.detach()[:1].float().cpu()
        if not torch.allclose(one, other, rtol=_ROUNDING, atol=1e-7, equal_nan=True):
            return name
    return None
