"""How much memory a block keeps from its forward to its backward, measured by the device's allocator."""

from __future__ import annotations

from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from automodel_trainer.nn.blocks import find_blocks


class BlockMemory:
    """Watches the first forward of a model's blocks. It waits for nothing: the allocator counts on the host.

    Args:
        model: the laid-out model.
        device: where it runs.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._starts: dict[int, int] = {}  # bytes in use when a block starts, in the order of the forward
        self._handles: list[RemovableHandle] = []
        if allocated(device) is not None:
            self._handles = [block.register_forward_pre_hook(self._note) for block in find_blocks(model)]

    def _note(self, block: nn.Module, args: Any) -> None:
        in_use = allocated(self._device)
        if block.training and torch.is_grad_enabled() and in_use is not None:
            self._starts.setdefault(id(block), in_use)

    def stop(self) -> int | None:
        """Stop watching.

        Returns:
            Bytes that a block keeps: the median over the blocks, because the first also holds what all blocks share.
            None if the device does not count memory, or fewer than three blocks ran.
        """
        for handle in self._handles:
            handle.remove()
        kept = [after - before for before, after in pairwise(self._starts.values())]
        return max(0, round(median(kept))) if len(kept) > 1 else None


def allocated(device: torch.device) -> int | None:
    """Bytes that torch's allocator has given out on a device; None for a CPU, which nobody counts on."""
    return None if device.type == "cpu" else int(torch.accelerator.memory_allocated(device))
