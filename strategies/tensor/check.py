"""Nets under tensor-parallel plans: numbers that a plan must keep, tried out on the model itself."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from automodel_trainer.models._transformers import expert_gate
from automodel_trainer.strategies.tensor.plan import TensorPlan

_TOLERANCE = 1e-2  # of a gradient's norm: kernels that add in any order differ by less
_NOISE = 1e-5  # of the largest gradient's norm


@torch.no_grad()
def check_gates(model: nn.Module, plan: TensorPlan, size: int) -> None:
    """Try whether the gate of fused experts, which are cut over `size` ranks, gives every rank its part of the whole.

    Raises:
        ValueError: it mixes columns that the plan gives to different ranks.
    """
    for name, module in model.named_modules():
        fused = expert_gate(module)
        cut = plan.placements.get(id(module._parameters.get(fused[0]))) if fused else None
        if fused is None or cut is None or any(True for child in module.children() for _ in child.parameters()):
            continue
        weight = module._parameters[fused[0]]
        assert weight is not None
        outputs = torch.randn(4, weight.shape[cut.dim], generator=torch.Generator().manual_seed(0))  # type: ignore
        whole = fused[1](outputs).chunk(size, dim=-1)
        groups = outputs.chunk(getattr(cut, "split_factor", 1), dim=-1)
        parts = [torch.cat([group.chunk(size, dim=-1)[rank] for group in groups], dim=-1) for rank in range(size)]
        if not all(torch.allclose(fused[1](part), expected) for part, expected in zip(parts, whole)):
            rule = re.sub(r"\.\d+(?=\.)", ".*", f"{name}.{fused[0]}")
            raise ValueError(
                f"The tensor-parallel plan of {type(model).__name__} cuts {rule} so that a rank's part of the gate "
                f"does not meet its part of the values. Give tp_plan={{{rule!r}: 'packed_colwise'}} (or "
                "'colwise' where the two alternate column by column), or set tp=1."
            )


@torch.no_grad()
def check_replicas(model: nn.Module, mesh: DeviceMesh) -> None:
    """Compare the gradients of replicated parameters over the 1-D tp `mesh`. Collective; waits for the device.

    A layer between two that are cut sees only its rank's part, and its plan must say so. A plan that does not would
    train every rank's copy on its own, without a word.

    Raises:
        ValueError: names the parameters whose gradients differ, and the rule that is missing.
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
            f"{_class(model)} replicates it, but every rank sees a part of its input. Where it stands between a layer "
            "that is cut by columns and one cut by rows, say so: "
            f"tp_plan={{{wrong[0]!r}: 'replicated_with_grad_allreduce'}}; else set tp=1 (or sequence_parallel=False)."
        )


def _is_replica(grad: DTensor, mesh: DeviceMesh) -> bool:
    """tp is the last axis of a gradient's mesh, or, where a layout leaves out replicas, no axis of it."""
    names = grad.device_mesh.mesh_dim_names or ()
    return isinstance(grad.placements[-1], Replicate) or not set(mesh.mesh_dim_names or ()) & set(names)


def _layer(parameter: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", parameter.rpartition(".")[0])


def _class(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("FSDP")
