"""Every private torch name about pipelines (torch 2.11-2.13)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage as TorchPipelineStage

__all__ = ["PipelineStage", "unviewed"]


class PipelineStage(TorchPipelineStage):
    """torch's stage, whose first message to its neighbours (torch 2.11) leaves out those on its own rank: gloo cannot
    send to itself, and neighbours on one rank never send (V-shaped schedules)."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def unviewed(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it where it is a view of another, which cannot be detached in place."""
    return tensor.clone() if tensor._is_view() else tensor
