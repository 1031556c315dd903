"""Checks that catch a wrong tensor-parallel plan by running parts of the model itself."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from automodel_trainer.models._transformers import expert_gate
from automodel_trainer.models.lora.layers import LowRank
from automodel_trainer.strategies.tensor.plan import TensorPlan

_TOLERANCE = 1e-2  # relative to a gradient's norm; kernels that sum in a different order differ by less
_NOISE = 1e-5  # relative to the largest gradient's norm; smaller gradients may differ by rounding alone


@torch.no_grad()
def check_gates(model: nn.Module, plan: TensorPlan, size: int) -> None:
    """Check that the gate of fused experts still computes the right columns when they are cut over `size` ranks.

    It applies the gate to random outputs, whole and in the parts that the plan gives to each rank, and compares.

    Args:
        size: number of tp ranks.

    Raises:
        ValueError: the gate combines columns that the plan gives to different ranks.
    """
    for name, module in model.named_modules():
        fused = expert_gate(module)
        cut = plan.placements.get(id(module._parameters.get(fused[0]))) if fused else None
        if fused is None or cut is None or _own_parts_have_weights(module):
            continue
        weight = module._parameters[fused[0]]
        assert weight is not None
        outputs = torch.randn(4, weight.shape[cut.dim], generator=torch.Generator().manual_seed(0))  # type: ignore
        whole = fused[1](outputs).chunk(size, dim=-1)
        # A packed cut gives a rank its part of each half; a plain cut one contiguous part.
        groups = outputs.chunk(getattr(cut, "split_factor", 1), dim=-1)
        parts = [torch.cat([group.chunk(size, dim=-1)[rank] for group in groups], dim=-1) for rank in range(size)]
        if not all(torch.allclose(fused[1](part), expected) for part, expected in zip(parts, whole)):
            rule = re.sub(r"\.\d+(?=\.)", ".*", f"{name}.{fused[0]}")
            raise ValueError(
                f"The tensor-parallel plan of {type(model).__name__} cuts {rule} so that a rank's gate columns do not "
                f"match its value columns. Set tp_plan={{{rule!r}: 'packed_colwise'}} (or 'colwise' if gate and value "
                "alternate column by column), or set tp=1."
            )


def _own_parts_have_weights(module: nn.Module) -> bool:
    """Whether parts of `module` have weights, which its gate may use: adapters are no such parts."""
    parts = (part for part in module.children() if not isinstance(part, LowRank))
    return any(True for part in parts for _ in part.parameters())


@torch.no_grad()
def check_replicas(model: nn.Module, mesh: DeviceMesh) -> None:
    """Compare the gradients of replicated parameters over the 1-D tp `mesh`. Collective, with a host/device sync.

    A layer between two cut layers sees only its rank's part of the activations, and the plan must say so. Otherwise
    each rank would silently train its own copy of the layer.

    Raises:
        ValueError: gradients differ. The message names the parameters and the missing rule.
    """
    names: list[str] = []
    norms: list[Tensor] = []
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if isinstance(grad, DTensor) and _is_replica(grad, mesh):
            names.append(name)
            norms.append(grad.to_local().to(mesh.device_type, torch.float64).norm())
    if not norms:
        return
    most, least = torch.stack(norms), torch.stack(norms)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=mesh.get_group())
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=mesh.get_group())
    differ = (most - least > _TOLERANCE * most) & (most > _NOISE * most.max())
    if differ.any():
        wrong = sorted({_layer(name) for name, bad in zip(names, differ.tolist()) if bad})
        raise ValueError(
            f"The ranks of tensor parallel compute different gradients of {', '.join(wrong)}: the plan of "
            f"{_class(model)} replicates it, but every rank sees only a part of its input. If it sits between a layer "
            "cut by columns and one cut by rows, set "
            f"tp_plan={{{wrong[0]!r}: 'replicated_with_grad_allreduce'}}. Otherwise set tp=1 (or "
            "sequence_parallel=False)."
        )


def _is_replica(grad: DTensor, mesh: DeviceMesh) -> bool:
    """Whether every tp rank holds all of this gradient."""
    # tp is the last axis of a gradient's mesh. In layouts that drop replicated axes it is no axis at all.
    names = grad.device_mesh.mesh_dim_names or ()
    if "ep" in names:  # experts are split over tp ranks too
        return False
    return isinstance(grad.placements[-1], Replicate) or not set(mesh.mesh_dim_names or ()) & set(names)


def _layer(parameter: str) -> str:
    """The plan's name for a parameter's layer: `model.layers.3.norm.weight` is `model.layers.*.norm`."""
    return re.sub(r"\.\d+(?=\.)", ".*", parameter.rpartition(".")[0])


def _class(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("FSDP")  # `fully_shard` adds it
