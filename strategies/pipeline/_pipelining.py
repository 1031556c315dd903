"""Every use of a private torch name for pipelines (torch 2.11-2.13)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage as TorchPipelineStage

__all__ = ["PipelineStage", "unviewed"]


class PipelineStage(TorchPipelineStage):
    """torch's stage, with a first exchange that skips neighbours on the same rank.

    In torch 2.11 every stage first sends a message to its neighbours. In V-shaped schedules a neighbour can be on the
    same rank: such stages never send to each other later, and gloo cannot send to itself.
    """

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def unviewed(tensor: Tensor) -> Tensor:
    """`tensor` `[…]`, or a copy if it is a view: views cannot be detached in place."""
    return tensor.clone() if tensor._is_view() else tensor
