"""Expert parallel: split the experts of a model over ranks, in place.

The stacked parameters become DTensors on the `ep` mesh, so that FSDP2, checkpoints and clipping can handle them. The
experts' own code runs on this rank's share, for the tokens that a dispatcher brings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from automodel_trainer.distributed._dtensor import StridedShard
from automodel_trainer.distributed.phase import during_place
from automodel_trainer.models._experts import hold_part_of_experts, numbers_for
from automodel_trainer.models.kernels.dispatch import Arrived, Dispatcher
from automodel_trainer.models.kernels.experts import GroupedExperts
from automodel_trainer.models.lora.layers import adapters
from automodel_trainer.nn.wrap import Forward, wrap
from automodel_trainer.strategies.expert.dispatch import AllToAll
from automodel_trainer.strategies.expert.plan import Experts
from automodel_trainer.strategies.tensor.collectives import gather_rows, slice_rows
from automodel_trainer.strategies.tensor.local_parameters import Held, local_parameters


def expert_parallel(
    layers: Sequence[Experts],
    mesh: DeviceMesh,
    tp: ProcessGroup | None = None,
    dispatcher: Callable[[ProcessGroup, int], Dispatcher] = AllToAll,
    compute: Callable[..., Any] | None = None,
) -> None:
    """Split the experts of every layer over the ranks of `mesh`, in place.

    Call it before tensor parallel, which leaves these modules alone. A layer's inputs and outputs stay what they were:
    this rank's tokens. Gradients of expert parameters are sums over the tokens of all ep ranks.

    Args:
        layers: from `find_experts`, on meta, or real and equal on all ranks.
        mesh: the 1-D ep mesh.
        tp: ranks that have the same tokens. They share the work: each sends its part of them.
        dispatcher: makes what carries the tokens, from the ep group and the number of experts per rank.
        compute: calls the experts' forward in training, `compute(forward, *args, **kwargs)`; see `compile_any_length`.
            None: a plain call.
    """
    for experts in layers:
        local = experts.count // mesh.size()
        placements = _placements(experts)
        held = _distribute(experts.module, mesh, placements)
        hold_part_of_experts(experts.module, local)
        carrier = dispatcher(mesh.get_group(), local)
        wrap(experts.module, _dispatched(experts.module, carrier, held, mesh.get_group(), tp, compute))


def _placements(experts: Experts) -> dict[int, Placement]:
    """How each parameter is split along its experts, by id: the stacked ones, and the factors of their adapters."""
    found: dict[int, Placement] = {}
    for key in experts.stacked:
        found[id(experts.module._parameters[key])] = Shard(0)
    for adapter in adapters(experts.module):
        if adapter.module is experts.module and adapter.parameter in experts.stacked:
            # A is [experts · rank, in], expert by expert. B is [out, rank · experts], the expert running fastest.
            found[id(adapter.a.weight)] = Shard(0)
            found[id(adapter.b.weight)] = StridedShard(1, split_factor=adapter.rank)
    return found


def _distribute(module: nn.Module, mesh: DeviceMesh, placements: dict[int, Placement]) -> Held:
    """Make the parameters inside `module` DTensors on `mesh`. Those without a placement are replicated.

    Every rank has the same values, so it cuts its own shard: `src_data_rank=None` sends nothing.
    """
    held: Held = []
    for part in module.modules():
        for key, parameter in list(part.named_parameters(recurse=False)):
            placement = placements.get(id(parameter), Replicate())
            cut = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
            part.register_parameter(key, nn.Parameter(cut, requires_grad=parameter.requires_grad))
            # All ranks' experts use a replicated parameter, each for its own tokens: its gradient is a part.
            held.append((part, key, isinstance(placement, Replicate)))
    return held


def _dispatched(
    module: nn.Module,
    carrier: Dispatcher,
    held: Held,
    ep: ProcessGroup,
    tp: ProcessGroup | None,
    compute: Callable[..., Any] | None,
) -> Forward:
    """The forward of a layer's experts: send tokens, run this rank's experts, bring the results back."""

    @torch.compiler.disable  # the number of rows that arrive is read on the host; `compute` compiles what is inside
    def forward(original: Forward, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        count = hidden_states.shape[0]
        if tp is not None:
            hidden_states, top_k_weights = slice_rows(hidden_states, tp), slice_rows(top_k_weights, tp)
            top_k_index = slice_rows(top_k_index, tp)
        with during_place("dispatch of tokens"):
            arrived = carrier.dispatch(hidden_states, top_k_index, top_k_weights)
        with local_parameters(held, ep):
            output = _run(module, original, arrived, compute)
        with during_place("combine of tokens"):
            output = carrier.combine(output.to(hidden_states.dtype), arrived.route)
        return output if tp is None else gather_rows(output, tp, count)

    return forward


def _run(module: nn.Module, experts: Forward, arrived: Arrived, compute: Callable[..., Any] | None) -> Tensor:
    """Run the experts on the tokens that arrived, `[m, h]` to `[m, h]`.

    If none arrived, one row of zeros takes their place: every parameter then gets a gradient of zero, and FSDP2 reduces
    the same parameters on all ranks.
    """
    hidden, weights, numbers = arrived.hidden, arrived.weights, numbers_for(module, arrived.experts)
    if not hidden.shape[0]:
        row = hidden.sum(0, keepdim=True)
        return experts(row, numbers.new_zeros(1, numbers.shape[1]), weights.sum(0, keepdim=True))[:0]
    counted = {"choices": arrived.choices} if isinstance(module, GroupedExperts) else {}
    if compute is None or not (module.training and torch.is_grad_enabled()):
        return experts(hidden, numbers, weights, **counted)
    return compute(experts, hidden, numbers, weights, **counted)


def place_expert(parameter: nn.Parameter, ranks: int) -> Shard:
    """The dimension of an expert parameter that FSDP2 shards over `ranks` ranks, for `fully_shard`.

    FSDP2 needs equal parts in any dimension but the first, and in one that `ep` has split already.

    Raises:
        ValueError: no dimension divides.
    """
    placement: Any = parameter.placements[0]  # type: ignore[attr-defined]
    local = parameter.to_local().shape  # type: ignore[attr-defined]
    split = getattr(placement, "dim", None)
    for dim in range(parameter.ndim):
        free = dim != split and (dim == 0 or local[dim] % ranks == 0)
        again = dim == split and type(placement) is Shard and local[dim] % ranks == 0
        if free or again:
            return Shard(dim)
    raise ValueError(
        f"An expert parameter {list(parameter.shape)} cannot be sharded over {ranks} more ranks: no dimension divides. "
        "Choose a larger ep, or a smaller dp_shard with dp_replicate."
    )
