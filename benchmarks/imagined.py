"""Run one process as rank 0 of several ranks that do not exist. Data from other ranks is a copy of its own.

This way one GPU shows the computation, memory and copies of a rank in a layout over many GPUs, with shards and gathered
weights in their real sizes. It shows nothing of the network: a real step is longer by the communication that it cannot
overlap. The values are not those of a real model, because the other ranks' shards are copies of this rank's, but they
are not zeros either.

It uses torch's process group for tests, which copies gathered tensors (private, torch 2.11-2.13).
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore


def imagine(world_size: int) -> None:
    """From now on, give every process group of this process `world_size` ranks, of which this is rank 0."""
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
