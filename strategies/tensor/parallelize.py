"""Tensor and sequence parallel: shard a model's matrices over ranks, by the plan that the model declares.

Parameters become DTensors on the tp mesh, so that FSDP2, checkpoints and clipping can handle them. The modules' own
code runs on local tensors: while a block's forward runs, its parameters are this rank's shards. Communication happens
only at the edges of cut layers (`collectives.py`). Between cut layers every rank has the same activations or, with
sequence parallel, its part of the sequence.

Source: Megatron-LM, arXiv 1909.08053; sequence parallel, arXiv 2205.05198.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from automodel_trainer.nn.blocks import find_blocks
from automodel_trainer.nn.parameters import replace_parameters
from automodel_trainer.nn.text import first_line
from automodel_trainer.nn.wrap import wrap
from automodel_trainer.strategies.tensor.adapters import cut_adapters
from automodel_trainer.strategies.tensor.check import check_gates
from automodel_trainer.strategies.tensor.layers import joint_entries, wrap_entry, wrap_layer
from automodel_trainer.strategies.tensor.local_parameters import Held, readers, with_local_parameters
from automodel_trainer.strategies.tensor.plan import TensorPlan, expand_plan
from automodel_trainer.strategies.tensor.sequence import SequenceParallel

_SHAPES = (
    "must match", "doesn't match", "is invalid for input of size", "cannot be multiplied", "not broadcastable",
    "got mixed torch.Tensor and DTensor",
)  # fmt: skip


def tensor_parallel(
    model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str] | None = None, sequence_parallel: bool = True
) -> None:
    """Shard `model` over a tensor-parallel mesh, in place.

    Its inputs and outputs are whole and equal on all ranks, and so are the gradients of replicated parameters.
    Parameter names and module types do not change. Parameters that are DTensors already (experts, under expert
    parallel) are left alone.

    Args:
        model: on meta, or real and equal on all ranks.
        mesh: the 1-D tp mesh.
        plan: rules that override the model's own `tp_plan`, with the same names and styles.
        sequence_parallel: between cut layers, each rank works on its part of the sequence only.

    Raises:
        ValueError: the plan does not fit the model or the number of ranks; see `expand_plan`, `check_gates` and
            `cut_adapters`.
    """
    expanded = expand_plan(model, mesh.size(), plan)
    check_gates(model, expanded, mesh.size())
    cut_adapters(model, expanded)
    joint = joint_entries(model, expanded)
    sequence = SequenceParallel(model, expanded, joint, mesh.get_group()) if sequence_parallel else None
    scattering = sequence.scattering if sequence else set()
    modules = dict(model.named_modules())
    # Wrappers nest: the layers' come first, inside those of their modules (entries, gathers) and of the blocks.
    for name, style in expanded.modules.items():
        wrap_layer(
            model, name, style, expanded, mesh, joint=name.rpartition(".")[0] in joint, scatter=name in scattering
        )
    for name in sorted(joint - (sequence.gathering if sequence else set())):
        wrap_entry(modules[name], mesh.get_group())
    if sequence:
        sequence.install()
    for block in find_blocks(model):
        wrap(block, _explained(type(model).__name__, sequence_parallel))
    _use_local_parameters(model, expanded, mesh.get_group())
    _distribute(model, mesh, expanded)


def _explained(name: str, sequence_parallel: bool) -> Callable[..., Any]:
    """Runs a block, and says what to do if its shapes do not match: it is the first forward that tells."""

    def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except RuntimeError as error:
            if not any(words in str(error) for words in _SHAPES):
                raise
            parts = (
                "Between its layers a rank has a part of the sequence, which the model may combine with a whole one: "
                "set sequence_parallel=False. If that fails too, the plan does not fit it: set"
                if sequence_parallel
                else "So the plan does not fit it: set"
            )
            raise ValueError(
                f"tp > 1 cuts {name} by its tp_plan, and then shapes in a layer do not match ({first_line(error)}). "
                f"{parts} tp=1 and shard with fsdp2, or give a tp_plan."
            ) from error

    return around


def _distribute(model: nn.Module, mesh: DeviceMesh, plan: TensorPlan) -> None:
    """Make every parameter a DTensor on the mesh. Those without a placement in the plan are replicated."""

    def cut(parameter: nn.Parameter) -> Tensor:
        if isinstance(parameter, DTensor):
            return parameter.detach()
        # Every rank has the same values, so it cuts its own shard: `src_data_rank=None` sends nothing.
        placement = plan.placements.get(id(parameter), Replicate())
        return distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)

    replace_parameters(model, cut)


def _use_local_parameters(model: nn.Module, plan: TensorPlan, group: ProcessGroup) -> None:
    """Make modules see their parameters as local tensors while they run."""
    for module, parts in readers(model):
        wrap(module, with_local_parameters(_held(parts, plan), group))


def _held(parts: Iterable[nn.Module], plan: TensorPlan) -> Held:
    return [
        (module, key, id(parameter) in plan.summed)
        for module in parts
        for key, parameter in module.named_parameters(recurse=False)
        if not isinstance(parameter, DTensor)  # experts swap in their own
    ]
