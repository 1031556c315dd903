"""FSDP2 gathers trained weights in fp8: every rank casts its shard, half as many bytes travel as in bf16, and what
comes out is what the matmuls of forward and backward take. No rank casts a whole weight.

Parameters stay plain (sharded, fp32 or bf16), so optimizers and checkpoints see nothing of it: FSDP2 looks for
`fsdp_pre_all_gather` and `fsdp_post_all_gather` on a shard, and a plain tensor can have these too. One scale serves a
whole weight, and in compiled blocks all weights that are multiplied together (`fp8_shared_input.py`): before a forward
the largest values of all shards are reduced over the ranks at once. It is the scale that the whole weight would have;
the cast begins at the master weight, not at its rounding to bf16.

Source: torchao.float8's `enable_fsdp_float8_all_gather`, which puts a tensor subclass into the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from automodel_trainer.models.quantization._torchao import fp8_dtype, fp8_scale, fp8_weight, set_fp8_scale
from automodel_trainer.models.quantization.fp8_layers import fp8_layers
from automodel_trainer.models.record import record_of
from automodel_trainer.nn.step_cache import StepCache
from automodel_trainer.strategies.data_parallel._fsdp import ShardedParameter, initialize_sharding, sharded_parameters


class Fp8Gather:
    """Makes FSDP2 gather weights of `model` in fp8.

    Args:
        model: the outermost unit, laid out by `fully_shard`, its parameters perhaps still on meta.
        layers: torchao's linear layers, scaled by whole tensors.
        group: the ranks that a weight's shards lie on.
        backend: of `torch.compile`, to cast by one kernel instead of by several operations; None: do not compile.
    """

    def __init__(self, model: FSDPModule, layers: list[nn.Module], group: ProcessGroup, backend: str | None) -> None:
        self.model, self.group = model, group
        self.wanted = {id(layer) for layer in layers}
        self.together = backend is not None
        self.cast = _cast if backend is None else _compiled_cast(backend)
        self.weights: list[_Weight] = []
        self.alike = torch.empty(0, 0)  # whether two weights are to have one scale
        self.cache = StepCache()  # scales, for all forwards of an optimizer step
        assert isinstance(model, nn.Module)
        model.register_forward_pre_hook(self._before_forward, prepend=True)  # before FSDP2's own

    def _before_forward(self, *_: object) -> None:
        if not self.cache.is_stale():
            return
        if not self.weights:
            initialize_sharding(self.model)  # afterwards shards stay where they are
            self.weights = [
                _Weight(parameter, self.cast)
                for parameter in sharded_parameters(self.model)
                if all(name == "weight" and id(owner) in self.wanted for owner, name in parameter.owners)
            ]
            if self.weights:
                device = self.weights[0].parameter.shard.device
                self.alike = _multiplied_together(self.weights).to(device)
        self._scale()

    @torch.no_grad()
    def _scale(self) -> None:
        """The scales of all weights, from their largest values over the ranks. Collective."""
        shards = [weight.attached() for weight in self.weights]
        if not shards:
            return
        # a rank can be left without a row
        held = [shard if shard.numel() else shard.new_zeros(1) for shard in shards]
        largest = torch.stack(torch._foreach_norm(held, math.inf)).float()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        if self.together:
            largest = torch.where(self.alike, largest, 0.0).amax(1)
        scales = fp8_scale(largest, self.weights[0].dtype)
        # one tensor each: compiled code copies inputs that do not begin at a multiple of 16 bytes
        for weight, scale in zip(self.weights, torch._foreach_mul(list(scales.unbind()), 1.0)):
            weight.scale = scale


class _Weight:
    """What FSDP2 asks of a shard when it gathers it."""

    def __init__(self, parameter: ShardedParameter, cast: Callable[..., Tensor]) -> None:
        self.parameter, self.cast = parameter, cast
        (self.layer, _), *_ = parameter.owners
        self.dtype = fp8_dtype(self.layer)
        self.scale: Tensor | None = None

    def attached(self) -> Tensor:
        """The shard, which comes back to this object when it is gathered."""
        if not hasattr(self.parameter.shard, "fsdp_pre_all_gather"):
            self.parameter.gather_by(self.fsdp_pre_all_gather, self.fsdp_post_all_gather)
        return self.parameter.shard

    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, size: torch.Size, stride: Any, module: nn.Module, policy: MixedPrecisionPolicy
    ) -> tuple[tuple[Tensor, ...], Any]:
        assert self.scale is not None, "the model's forward begins with its outermost unit"
        shard = self.parameter.shard
        codes = self.cast(shard.reshape(-1), self.scale, self.dtype).view(shard.shape)
        missing = -(-size[0] // mesh.size()) - codes.shape[0]
        if missing:  # fewer rows than others have
            codes = F.pad(codes.view(torch.uint8), (0, 0, 0, missing)).view(self.dtype)
        return (codes,), self.scale

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], scale: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        if out is not None:  # its codes are `outputs`
            set_fp8_scale(out, scale)
            return None
        return fp8_weight(outputs[0], scale, param_dtype, self.layer), outputs


def _multiplied_together(weights: list[_Weight]) -> Tensor:
    """Of each two weights, whether they are: `[weights, weights]`."""
    groups = torch.tensor([id(weight.layer.together) for weight in weights])
    return groups[:, None] == groups


def _cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-limit, limit).to(dtype)


@cache
def _compiled_cast(backend: str) -> Callable[..., Tensor]:
    return torch.compile(_cast, backend=backend, dynamic=True)


def gather_in_fp8(
    model: nn.Module, shard_mesh: DeviceMesh, *, tp: int, cpu_offload: bool, compile_backend: str | None
) -> None:
    """Let FSDP2 gather the weights of `model`'s fp8 layers in fp8, where that can be and was not switched off.

    Args:
        model: the outermost unit, laid out by `fully_shard`.
        shard_mesh: that parameters are sharded over; its last axis is the one that gathers.
        tp: ranks that tensor parallel cuts the weights over.
        cpu_offload: whether shards wait on the CPU.
        compile_backend: of `torch.compile`; None: the run does not compile.

    Raises:
        ValueError: it was asked for, and cannot be.
    """
    layers: list[nn.Module] = []
    group = shard_mesh.get_group(shard_mesh.ndim - 1)
    obstacle = _obstacle(group.size(), tp, cpu_offload)
    for owner in model.modules():
        found = fp8_layers(owner)
        if found is None or not found.gatherable or found.all_gather is False:
            continue
        if obstacle is None:
            wanted = set(found.gatherable)
            layers += [module for name, module in owner.named_modules() if name in wanted]
            record_of(owner).keep(replace(found, gathered=True))
        elif found.all_gather is True:
            raise ValueError(f"kernels fp8_all_gather=true: {obstacle}. Leave it at 'auto', or set it to false.")
    if not layers:
        return
    assert isinstance(model, FSDPModule)
    Fp8Gather(model, layers, group, compile_backend)


def _obstacle(ranks: int, tp: int, cpu_offload: bool) -> str | None:
    if ranks == 1:
        return "on one rank nothing is gathered"
    if tp > 1:
        return f"tp={tp} cuts the weights that FSDP2 would cast"
    return "cpu_offload=true keeps the weights on the CPU, which would cast them" if cpu_offload else None
