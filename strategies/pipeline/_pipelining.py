"""Every use of a private torch name for pipelines (torch 2.11-2.13)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.distributed.pipelining import PipelineStage as TorchPipelineStage

__all__ = ["PipelineStage", "unviewed"]


class PipelineStage(TorchPipelineStage):
    """torch's stage, with what torch 2.11 and 2.12 need."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """A first exchange that skips neighbours on the same rank.

        In torch 2.11 every stage first sends a message to its neighbours. In V-shaped schedules a neighbour can be on
        the same rank: such stages never send to each other later, and gloo cannot send to itself.
        """
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], list[dict[str, Any]] | None]:
        """Keep the graph from the pass for inputs until the pass for weights.

        The second pass starts at nodes in the middle of the graph. Before torch 2.13 the Python object of a custom
        `autograd.Function` does not keep its node alive, and torch drops the outputs after the first pass.
        """
        if backward_type != "input" or torch.__version__ >= (2, 13):  # type: ignore[operator]
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        outputs = bwd_kwargs["stage_output"]
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        graph = [get_gradient_edge(output) for output in outputs if output.requires_grad]
        gradients, groups = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        for group in groups or ():
            group["graph"] = graph  # torch keeps the groups as long as they are needed
        return gradients, groups


def unviewed(tensor: Tensor) -> Tensor:
    """`tensor` `[…]`, or a copy if it is a view: views cannot be detached in place."""
    return tensor.clone() if tensor._is_view() else tensor
