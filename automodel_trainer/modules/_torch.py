"""Every use of a private torch name in the modules (torch 2.11-2.13)."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch._functorch.config


def without_graph_cache() -> AbstractContextManager[None]:
    """Compile without looking for the graph on disk, where DTensors are told apart by shape and placement alone.

    Graphs of other packings of the same shape (8-bit and 4-bit optimizer state) are taken for this one's, and fail.
    """
    return torch._functorch.config.patch(enable_autograd_cache=False)
