"""Initial values of adapters, the same on every layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from automodel_trainer.models.lora.layers import Adapter, LoRALayer, dense
from automodel_trainer.nn.uneven import assign_uneven, gather_uneven, is_uneven


@torch.no_grad()
def initialize_adapter(adapter: Adapter, init: str, seed: int) -> None:
    """Fill an adapter. Collective where it is sharded.

    Full tensors are drawn on the CPU: adapters are small, and so every device and layout gets the same values.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    a, b = torch.empty(adapter.a.weight.shape, device="cpu"), torch.zeros(adapter.b.weight.shape, device="cpu")
    if init == "orthogonal":
        a, b = _orthogonal(a.shape, b.shape, generator)
    elif init == "pissa":
        weight = _as_matrix(adapter, whole(adapter.module.weight))  # type: ignore[arg-type]
        a, b = principal_factors(weight, adapter.rank, adapter.scaling)
        rest = (weight.float() - adapter.scaling * b @ a).to(weight.dtype)
        assign(adapter.module.weight, _as_matrix(adapter, rest))  # type: ignore[arg-type]
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    assign(adapter.a.weight, a)
    assign(adapter.b.weight, b)
    if adapter.magnitude is not None:
        assert isinstance(adapter.module, LoRALayer)
        weight = _as_matrix(adapter, whole(adapter.module.weight))
        direction = dense(weight).float() + adapter.scaling * (b @ a).to(weight.device)
        assign(adapter.magnitude, torch.linalg.vector_norm(direction, dim=1))


def _as_matrix(adapter: Adapter, weight: Tensor) -> Tensor:
    """Between the layout that an adapted layer holds its weight in and `[out, in]`, both ways."""
    return weight.mT if adapter.is_transposed else weight


def _orthogonal(a_shape: torch.Size, b_shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B from opposite halves of a random orthogonal basis: both random, and B·A = 0 (as PEFT has it)."""
    rank, inputs, outputs = a_shape[0], a_shape[1], b_shape[0]
    basis, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator, device="cpu"))
    a = (torch.randn(inputs, rank // 2, generator=generator, device="cpu") @ basis[0::2]).T / 10
    b = torch.randn(rank // 2, outputs, generator=generator, device="cpu").T @ basis[1::2] / 10
    return a.contiguous(), b.contiguous()


def principal_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """PiSSA's A and B: scaling · B·A is the best approximation of `weight` `[out, in]` of that rank."""
    if rank > min(weight.shape):
        raise ValueError(f"lora init='pissa': rank {rank} is more than a weight of shape {list(weight.shape)} has.")
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (values[:rank] / scaling).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, dequantized; of a DTensor, gathered (collective)."""
    if is_uneven(tensor):
        return gather_uneven(tensor)
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor.to_local()
    if (plain := dense(local)) is not local:
        tensor = DTensor.from_local(plain, tensor.device_mesh, tensor.placements, run_check=False)
    # With CPU offload the shards lie in host memory, where NCCL cannot gather them.
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]


def assign(parameter: Tensor, full: Tensor) -> None:
    """Write a full tensor into a parameter, or this rank's shard of it."""
    if is_uneven(parameter):
        assign_uneven(parameter, full)
        return
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    full = full.to(parameter.device_mesh.device_type)
    shard = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(shard.to_local())
