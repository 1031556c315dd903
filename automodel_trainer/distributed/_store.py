"""The store through which the ranks of the default process group met, which torch keeps for itself."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import distributed_c10d


def default_store() -> dist.Store:
    """It works while collectives hang, and in any thread."""
    return distributed_c10d._get_default_store()
