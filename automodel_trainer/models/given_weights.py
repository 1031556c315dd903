"""A short hash of the weights of a model object, so that a resumed run notices another base of its adapters."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from automodel_trainer.nn.samples import sample_of


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
