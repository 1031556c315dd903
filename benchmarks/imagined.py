"""One process as rank 0 of several that are not there: what they would send is copied from what it has itself.

So one GPU shows what a rank of a layout over more of them computes, holds and copies, with its shards and its gathered
weights in their real sizes; and nothing of the network: a real step is longer by what its collectives do not hide.
Numbers are not a model's (the other ranks' shards are this one's), but they are no zeros either.

Uses torch's process group for tests, which copies what is gathered (private, torch 2.11 to 2.13).
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore


def imagine(world_size: int) -> None:
    """Make every process group of this process, from now on, one of `world_size` ranks of which this is the first."""
    place = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "NODE_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    place |= {"WORLD_SIZE": world_size, "TORCHELASTIC_RUN_ID": "imagined", "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    real = dist.init_process_group

    def init_process_group(*_: Any, **__: Any) -> None:
        real("fake", rank=0, world_size=world_size, store=FakeStore())

    def reduce_scatter_tensor(output: Tensor, input: Tensor, *_: Any, **__: Any) -> None:
        output.copy_(input.view(-1, *output.shape)[0])

    dist.init_process_group = init_process_group
    dist.reduce_scatter_tensor = reduce_scatter_tensor
