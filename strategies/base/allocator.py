"""How a GPU's memory is handed out."""

from __future__ import annotations

import os

import torch

from automodel_trainer.nn._torch import set_allocator

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's own, the older name last
EXPANDABLE = "expandable_segments:True"


def allocator_of(device: torch.device) -> str | None:
    """What the allocator of `device` is set to, in torch's words: by the user, else segments that can grow, so that
    tensors of many sizes leave no holes between them. None: a device that has none."""
    if device.type != "cuda":
        return None
    return next((os.environ[name] for name in VARIABLES if os.environ.get(name)), EXPANDABLE)


def configure_allocator(device: torch.device) -> None:
    """Before the model is built. What torch's environment variables say is left alone."""
    if allocator_of(device) == EXPANDABLE:
        set_allocator(EXPANDABLE)
