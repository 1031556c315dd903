"""Every use of a private torch name for DDP (torch 2.11-2.13)."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

__all__ = ["remove_hooks"]


def remove_hooks(wrapped: DistributedDataParallel) -> None:
    """Let the parameters of a wrapped model go: its hooks would reduce gradients beside those of another wrapper."""
    wrapped._remove_autograd_hooks()
