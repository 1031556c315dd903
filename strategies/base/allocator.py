"""The settings of the GPU memory allocator."""

from __future__ import annotations

import os

import torch

from automodel_trainer.nn._torch import set_allocator

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's names, the older one last
EXPANDABLE = "expandable_segments:True"


def allocator_of(device: torch.device) -> str | None:
    """The allocator settings for `device`, in torch's syntax; None for a device that is not a GPU.

    The user's environment variables win. Otherwise it is expandable segments, which tensors of many sizes do not
    fragment.
    """
    if device.type != "cuda":
        return None
    return next((os.environ[name] for name in VARIABLES if os.environ.get(name)), EXPANDABLE)


def configure_allocator(device: torch.device) -> None:
    """Turn on expandable segments unless the user's environment says otherwise. Call it before building the model."""
    if allocator_of(device) == EXPANDABLE:
        set_allocator(EXPANDABLE)
