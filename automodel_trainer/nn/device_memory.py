"""What torch's allocator has given out and taken of a device."""

from __future__ import annotations

import gc

import torch


class DeviceMemory:
    """The memory of a GPU as this process sees it. It waits for nothing: the allocator counts on the host.

    Args:
        device: the GPU; without an index the one that this process uses.
    """

    def __init__(self, device: torch.device) -> None:
        current = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", current)

    @property
    def total(self) -> int:
        """Bytes that the device has, or the share of them that this process is limited to."""
        share = torch.cuda.get_per_process_memory_fraction(self.device)
        return int(torch.cuda.get_device_properties(self.device).total_memory * share)

    @property
    def room(self) -> int:
        """The most bytes that the allocator can take now, with those that it has: others use the device too."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(self.total, free + torch.cuda.memory_reserved(self.device))

    def allocated(self) -> int:
        """Bytes that tensors hold now."""
        return torch.cuda.memory_allocated(self.device)

    def restart(self) -> None:
        """Free what nobody uses, and begin a new peak."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """The most bytes that the allocator has taken since `restart`: what tensors held, and what lay between them."""
        return torch.cuda.max_memory_reserved(self.device)


def memory_of(device: torch.device) -> DeviceMemory | None:
    """The memory of a device; None for one that nobody counts on, such as a CPU."""
    return DeviceMemory(device) if device.type == "cuda" else None
