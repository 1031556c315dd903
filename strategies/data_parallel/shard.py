"""FSDP2 applied to a model: which modules are units, which parameters are left out, and when gradients are reduced."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from automodel_trainer.distributed._dtensor import StridedShard
from automodel_trainer.models.lora.layers import Adapter, adapters, let_adapters_cast
from automodel_trainer.models.quantization.quantize import quantized_weights
from automodel_trainer.nn.blocks import find_blocks, untied_input_embedding
from automodel_trainer.nn.device_memory import DeviceMemory, memory_of
from automodel_trainer.nn.weights_copy import copy_weights_only
from automodel_trainer.strategies.base.precision import Dtypes, fsdp_policy
from automodel_trainer.strategies.data_parallel import gradient_reduction
from automodel_trainer.strategies.data_parallel._fsdp import (
    forget_interrupted,
    forget_replaced_shards,
    initialize_sharding,
    lay_out_gradients_at_once,
)
from automodel_trainer.strategies.data_parallel.accumulate_grads_foreach import accumulate_grads_foreach
from automodel_trainer.strategies.data_parallel.generate import gather_once_in_generate
from automodel_trainer.strategies.expert.parallelize import place_expert

HELD = 0.1  # of a GPU's memory, which gradients may take while they wait for the last micro-batch
_SMALL = 2**30  # bytes; see `_small`
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class ShardOptions:
    """How FSDP2 shards. `FSDP2Strategy` documents each of them."""

    reshard_after_forward: bool = True
    forward_prefetch: int = 0
    backward_prefetch: int = 0
    cpu_offload: bool = False
    sync_every_micro_batch: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.sync_every_micro_batch not in (True, False, "auto"):
            raise ValueError(
                f"sync_every_micro_batch={self.sync_every_micro_batch!r} is unknown. Allowed: true, false, auto."
            )


@dataclass(frozen=True)
class ShardedExperts:
    """Experts that expert parallel has split, and the mesh to shard them over; see `strategies/expert/mesh.py`."""

    modules: list[nn.Module]
    mesh: DeviceMesh


class Shards:
    """Shards models with FSDP2, and controls in which micro-batches gradients are reduced.

    Works without a Trainer: `Shards(options).apply(model, mesh, dtypes)` lays a model out, then every micro-batch runs
    inside `sync(model, last=...)`.

    Args:
        options: see `ShardOptions`.
    """

    def __init__(self, options: ShardOptions) -> None:
        self.options = options
        self.waits_for: str | None = None  # what keeps gradients to the end of a step, whatever the options say
        self.experts: ShardedExperts | None = None
        self._keeps_copies = False
        self._self_casting: list[Adapter] = []
        self._gathered_gradients = 0  # bytes that gradients take on a rank while they wait to be reduced
        self._memory: DeviceMemory | None = None

    @property
    def syncs_every_micro_batch(self) -> bool:
        """Whether gradients are reduced after every micro-batch, and not only after a step's last one."""
        if self.waits_for is not None:
            return False
        if self.options.sync_every_micro_batch != "auto":
            return self.options.sync_every_micro_batch
        return self._take_much

    @property
    def _take_much(self) -> bool:
        """Whether gradients that wait take more than their share of this device; unknown before a model is laid out."""
        return self._memory is not None and self._gathered_gradients > HELD * self._memory.total

    def apply(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        dtypes: Dtypes,
        *,
        alone: bool = False,
        whole: Collection[nn.Parameter] = (),
    ) -> None:
        """Make `model` (on meta or real) and each of its blocks a unit of FSDP2, in place.

        Gradients are averaged over the ranks of the mesh, as FSDP2 does it.

        Args:
            mesh: the 1-D mesh to shard over; for HSDP a 2-D mesh (replicate, shard).
            dtypes: dtypes of parameters and computation.
            alone: whether one device trains this model and the optimizer holds nothing else.
            whole: parameters that stay as they are on every rank. The caller averages their gradients.

        Raises:
            ValueError: CPU offload of quantized weights on one rank.
        """
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": fsdp_policy(dtypes),
            "shard_placement_fn": _shard_dimension,
            "offload_policy": offload if self.options.cpu_offload else OffloadPolicy(),
            "ignored_params": set(whole),
        }
        if mesh.size(mesh.ndim - 1) == 1:  # nothing to gather: leave out what FSDP2 would only copy
            casting = self._let_cast(model, dtypes.compute) if alone else set()
            options["ignored_params"] |= self._left_alone(model, dtypes.compute) | casting
            self._keeps_copies = _small(model, dtypes.compute, options["ignored_params"])
        else:
            self._choose_sync(model, dtypes, mesh, options["ignored_params"])
        lay_out_gradients_at_once()
        blocks = find_blocks(model)
        reshard = self.options.reshard_after_forward and not self._keeps_copies
        if self.experts is not None:
            self._shard_experts(model, {**options, "reshard_after_forward": reshard})
        for unit in (*blocks, *untied_input_embedding(model)):
            fully_shard(unit, reshard_after_forward=reshard, **options)
        # The root unit holds the rest (final norm, head, tied embedding). It stays gathered between forward and
        # backward, because backward begins where forward ended.
        fully_shard(model, reshard_after_forward=False, **options)
        copy_weights_only(model)
        _gather_outside_inference_mode(model)
        if mesh.size(mesh.ndim - 1) > 1:
            others = mesh.size() < dist.get_world_size()  # of tensor parallel or pipelines
            gather_once_in_generate(
                model,
                mesh.get_group(mesh.ndim - 1),
                dtypes.compute,
                resharding=reshard,
                independent=self.experts is None and not others,
            )
        _prefetch(blocks, self.options.forward_prefetch, self.options.backward_prefetch)
        if self.experts is not None:
            gradient_reduction.average_over(self.experts.modules, mesh.size())

    def _choose_sync(self, model: nn.Module, dtypes: Dtypes, mesh: DeviceMesh, ignored: set[nn.Parameter]) -> None:
        """Count what gradients of `model` take while they wait, and say what follows if that is much."""
        before = self._take_much
        self._gathered_gradients += _gradient_bytes(model, dtypes, ignored)
        self._memory = memory_of(torch.device(mesh.device_type))
        if before or not self._take_much:
            return
        size = f"{self._gathered_gradients / 2**30:.1f} GiB"
        if self.waits_for is not None:
            rank_zero_info(f"{self.waits_for} keeps whole gradients until the end of a step: {size} on this GPU.")
        elif self.options.sync_every_micro_batch == "auto":
            rank_zero_info(
                "sync_every_micro_batch='auto': chose true. Gradients that wait for the last micro-batch would take "
                f"{size}. Set it to false if there is room."
            )

    def _shard_experts(self, model: nn.Module, options: dict[str, Any]) -> None:
        """Make the experts of each layer a unit of their own: they are sharded over fewer ranks than the rest."""
        assert self.experts is not None
        mesh = self.experts.mesh
        place = partial(place_expert, ranks=mesh.size(mesh.ndim - 1))
        inside = set(model.modules())
        for module in (module for module in self.experts.modules if module in inside):
            fully_shard(module, **{**options, "mesh": mesh, "shard_placement_fn": place})

    def _let_cast(self, model: nn.Module, compute: torch.dtype) -> set[nn.Parameter]:
        """If only adapters are trained, let them cast their own parameters, and return those for FSDP2 to ignore.

        FSDP2 would copy hundreds of small parameters one by one, and as many gradients.
        """
        if self.options.cpu_offload:
            return set()
        found = list(adapters(model))
        held = {parameter for adapter in found for parameter in adapter.parameters}
        if held != {parameter for parameter in model.parameters() if parameter.requires_grad}:
            return set()
        let_adapters_cast(model, compute)
        self._self_casting += found
        return held

    def _left_alone(self, model: nn.Module, compute: torch.dtype) -> set[nn.Parameter]:
        """The parameters that FSDP2 should ignore when there is nothing to gather.

        These are frozen weights that are held in the compute dtype, which FSDP2 would copy before every use for
        nothing, and quantized weights, of which FSDP2 keeps only the first inner tensor.

        Raises:
            ValueError: CPU offload of quantized weights, which FSDP2 would have to move.
        """
        quantized = quantized_weights(model)
        if not self.options.cpu_offload:
            return quantized | {p for p in model.parameters() if not p.requires_grad and p.dtype == compute}
        if quantized:
            raise ValueError(
                "cpu_offload=True with 4-bit weights needs more than one shard. Set dp_shard > 1, or cpu_offload=False."
            )
        return set()

    @contextmanager
    def sync(self, model: nn.Module, last: bool) -> Iterator[None]:
        """A context around one micro-batch. Gradients are reduced in the `last` one, or in all by option."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last or self.syncs_every_micro_batch)
            model.set_is_last_backward(last)  # only then FSDP2 waits for its reductions
            model.set_reshard_after_backward(last or not self._keeps_copies)
        # Read the adapters' parameters now: those of a model laid out on meta have been replaced since.
        parameters = [parameter for adapter in self._self_casting for parameter in adapter.parameters]
        with accumulate_grads_foreach(parameters):
            yield

    @contextmanager
    def no_sync(self, module: nn.Module) -> Iterator[None]:
        """A context around micro-batches of a user's own module whose gradients only accumulate."""
        if self.syncs_every_micro_batch:
            yield
            return
        roots = [m for m in module.modules() if isinstance(m, FSDPModule)]
        for root in roots:
            root.set_requires_gradient_sync(False)
        yield
        for root in roots:
            root.set_requires_gradient_sync(True)

    def finish(self, model: nn.Module, device: torch.device) -> None:
        """Once the shards have their values: forget those that were quantized. With CPU offload, move all to the CPU.

        Buffers stay on `device`: FSDP2 does not copy them for use.
        """
        forget_replaced_shards(model)
        if self.options.cpu_offload and device.type != "cpu":
            model.cpu()
            for module in model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(device)

    def forget_interrupted(self, model: nn.Module) -> None:
        """Forget what a step has begun that has raised an error: gathered parameters, and what was to be reduced."""
        if isinstance(model, FSDPModule):
            forget_interrupted(model)

    def forget(self) -> None:
        """Release the model."""
        self._self_casting = []
        self._gathered_gradients = 0
        self.experts = None


def is_laid_out(model: nn.Module) -> bool:
    """Whether some layout has been applied to this module already."""
    return isinstance(model, FSDPModule) or any(isinstance(p, DTensor) for p in model.parameters())


def batch_norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of batch norms. Their statistics are fp32, so torch refuses to run them with bf16 parameters."""
    norms = (module for module in model.modules() if isinstance(module, _BATCH_NORMS))
    return {parameter for norm in norms for parameter in norm.parameters()}


def _small(model: nn.Module, dtype: torch.dtype, ignored: set[nn.Parameter]) -> bool:
    """Whether FSDP2's copies in the compute dtype may be kept for a whole optimizer step: up to 1 GiB.

    On one device these copies are all that FSDP2 makes. They are small if adapters are trained together with a few
    other parameters.
    """
    return sum(p.numel() for p in model.parameters() if p not in ignored) * dtype.itemsize <= _SMALL


def _gradient_bytes(model: nn.Module, dtypes: Dtypes, ignored: set[nn.Parameter]) -> int:
    """What the gathered gradients of `model` take on this rank, in the dtype in which micro-batches are summed."""
    trained = (p for p in model.parameters() if p.requires_grad and p not in ignored)
    held = (p.to_local() if isinstance(p, DTensor) else p for p in trained)
    return sum(tensor.numel() for tensor in held) * (fsdp_policy(dtypes).reduce_dtype or dtypes.parameters).itemsize


def _shard_dimension(parameter: nn.Parameter) -> Shard | None:
    """The dimension that FSDP2 shards: 0 (None), unless tensor parallel has cut that one in the packed way.

    FSDP2 cannot cut a packed dimension (a part of each of its halves) once more.
    """
    packed = isinstance(parameter, DTensor) and any(
        isinstance(p, StridedShard) and p.dim == 0 for p in parameter.placements
    )
    return Shard(1) if packed and parameter.ndim > 1 else None


def _gather_outside_inference_mode(model: nn.Module) -> None:
    """Let a model be trained whose first forward is in `torch.inference_mode()`.

    FSDP2 makes a unit's buffers when it first gathers it and uses them for ever. Those made in inference mode can be
    written in inference mode alone.
    """

    def gather(module: nn.Module, _: Any) -> None:
        handle.remove()
        if not torch.is_inference_mode_enabled():
            return
        with torch.inference_mode(False):
            initialize_sharding(module)  # type: ignore[arg-type]
            for unit in (unit for unit in module.modules() if isinstance(unit, FSDPModule)):
                unit.unshard()
                unit.reshard()

    handle = model.register_forward_pre_hook(gather, prepend=True)


def _prefetch(blocks: list[nn.Module], forward: int, backward: int) -> None:
    """Tell each block which others to gather ahead: the next ones in forward, the previous ones in backward."""
    for index, block in enumerate(blocks):
        assert isinstance(block, FSDPModule)
        if forward:
            block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + forward])  # type: ignore[arg-type]
        if backward:
            before = blocks[max(0, index - backward) : index]
            block.set_modules_to_backward_prefetch(before[::-1])  # type: ignore[arg-type]
