"""FSDP2 gathers trained weights in fp8: each rank casts its own shard, and no rank casts a whole weight.

Half as many bytes are sent as in bf16, and the matmuls of forward and backward use the gathered codes directly.
Parameters stay plain tensors (sharded, fp32 or bf16), so optimizers and checkpoints do not notice. This works because
FSDP2 looks for `fsdp_pre_all_gather` and `fsdp_post_all_gather` on a shard, and a plain tensor can have them too.

Each weight has one scale. In compiled blocks all weights that share an input have one scale together
(`models/quantization/fp8_shared_input.py`). Before a forward, one reduction over ranks finds the amax of every weight,
so the scale is the one that the whole weight would have. The cast starts from the master weight, not from its bf16
rounding.

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
from automodel_trainer.nn._torch import foreach_mul, foreach_norm
from automodel_trainer.nn.step_cache import StepCache
from automodel_trainer.strategies.data_parallel._fsdp import ShardedParameter, initialize_sharding, sharded_parameters


class Fp8Gather:
    """Makes FSDP2 gather weights of `model` in fp8.

    Args:
        model: the outermost unit, sharded by `fully_shard`; its parameters may still be on meta.
        layers: torchao's linear layers with tensorwise scaling.
        group: the ranks that hold the shards of a weight.
        backend: the `torch.compile` backend for a cast in one kernel; None: cast by several eager operations.
    """

    def __init__(self, model: FSDPModule, layers: list[nn.Module], group: ProcessGroup, backend: str | None) -> None:
        self.model, self.group = model, group
        self.wanted = {id(layer) for layer in layers}
        self.together = backend is not None
        self.cast = _cast if backend is None else _compiled_cast(backend)
        self.weights: list[_Weight] = []
        self.same_scale = torch.empty(0, 0)  # bool [weights, weights]: whether two weights share a scale
        self.cache = StepCache()  # the scales serve all forwards of an optimizer step
        assert isinstance(model, nn.Module)
        model.register_forward_pre_hook(self._before_forward, prepend=True)  # before FSDP2's own

    def _before_forward(self, *_: object) -> None:
        if not self.cache.is_stale():
            return
        if not self.weights:
            initialize_sharding(self.model)  # from here on FSDP2 keeps its shards, so hooks can be attached to them
            self.weights = [
                _Weight(parameter, self.cast)
                for parameter in sharded_parameters(self.model)
                if all(name == "weight" and id(owner) in self.wanted for owner, name in parameter.owners)
            ]
            if self.weights:
                device = self.weights[0].parameter.shard.device
                self.same_scale = _multiplied_together(self.weights).to(device)
        self._scale()

    @torch.no_grad()
    def _scale(self) -> None:
        """Set the scales of all weights from their amax over the ranks. Collective."""
        shards = [weight.attached() for weight in self.weights]
        if not shards:
            return
        # A rank's shard can be empty. Its amax is 0.
        held = [shard if shard.numel() else shard.new_zeros(1) for shard in shards]
        largest = torch.stack(foreach_norm(held, math.inf)).float()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        if self.together:
            largest = torch.where(self.same_scale, largest, 0.0).amax(1)
        scales = fp8_scale(largest, self.weights[0].dtype)
        # A tensor of its own for each scale, not a view: compiled code copies inputs that are not 16-byte aligned.
        for weight, scale in zip(self.weights, foreach_mul(list(scales.unbind()), 1.0)):
            weight.scale = scale


class _Weight:
    """The FSDP2 extension of one weight: casts its shard before the gather, wraps the codes after it."""

    def __init__(self, parameter: ShardedParameter, cast: Callable[..., Tensor]) -> None:
        self.parameter, self.cast = parameter, cast
        (self.layer, _), *_ = parameter.owners
        self.dtype = fp8_dtype(self.layer)
        self.scale: Tensor | None = None

    def attached(self) -> Tensor:
        """The weight's shard, with the hooks of this object attached."""
        # Once per shard: this runs in every step.
        if not hasattr(self.parameter.shard, "fsdp_pre_all_gather"):
            self.parameter.gather_by(self.fsdp_pre_all_gather, self.fsdp_post_all_gather)
        return self.parameter.shard

    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, size: torch.Size, stride: Any, module: nn.Module, policy: MixedPrecisionPolicy
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Cast the shard. FSDP2 gathers the returned codes, `[ceil(rows / ranks), columns]`, equal on all ranks."""
        assert self.scale is not None, "a forward must start at the outermost unit, which sets the scales"
        shard = self.parameter.shard
        codes = self.cast(shard.reshape(-1), self.scale, self.dtype).view(shard.shape)
        missing = -(-size[0] // mesh.size()) - codes.shape[0]
        if missing:  # this rank has fewer rows than others; fp8 itself cannot be padded
            codes = F.pad(codes.view(torch.uint8), (0, 0, 0, missing)).view(self.dtype)
        return (codes,), self.scale

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], scale: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """Wrap the gathered codes as an fp8 weight, or update `out`, the weight that an earlier gather returned."""
        if out is not None:  # `outputs` are its codes: FSDP2 gathers into the same memory again
            set_fp8_scale(out, scale)
            return None
        return fp8_weight(outputs[0], scale, param_dtype, self.layer), outputs


def _multiplied_together(weights: list[_Weight]) -> Tensor:
    """Whether each two weights share an input and so a scale: bool `[weights, weights]`."""
    groups = torch.tensor([id(weight.layer.together) for weight in weights])
    return groups[:, None] == groups


def _cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp8 codes of `x` `[n]`; `scale` is 0-dim."""
    limit = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-limit, limit).to(dtype)


@cache
def _compiled_cast(backend: str) -> Callable[..., Tensor]:
    """`_cast` as one kernel. One per process: shards of all sizes share it (`dynamic`)."""
    return torch.compile(_cast, backend=backend, dynamic=True)


def gather_in_fp8(
    model: nn.Module, shard_mesh: DeviceMesh, *, tp: int, cpu_offload: bool, compile_backend: str | None
) -> None:
    """Make FSDP2 gather the weights of `model`'s fp8 layers in fp8, unless the layout or the user rules it out.

    Args:
        model: the outermost unit, sharded by `fully_shard`.
        shard_mesh: the mesh that parameters are sharded over; FSDP2 gathers over its last axis.
        tp: ranks that tensor parallel cuts the weights over.
        cpu_offload: whether shards live in CPU memory.
        compile_backend: the `torch.compile` backend; None: the run does not compile.

    Raises:
        ValueError: the user set fp8_all_gather=true and this layout cannot do it.
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
            record_of(owner).keep(replace(found, gathered=True))  # for the check after layout
        elif found.all_gather is True:
            raise ValueError(f"kernels fp8_all_gather=true: {obstacle}. Set it to 'auto' or false.")
    if not layers:
        return
    assert isinstance(model, FSDPModule)
    Fp8Gather(model, layers, group, compile_backend)


def _obstacle(ranks: int, tp: int, cpu_offload: bool) -> str | None:
    """Why weights cannot be gathered in fp8, in words; None if they can."""
    if ranks == 1:
        return "on one rank nothing is gathered"
    if tp > 1:
        return f"tp={tp} cuts the weights that FSDP2 would cast"
    return "cpu_offload=true keeps the weights on the CPU, which would have to cast them" if cpu_offload else None
