"""Every use of megatron-fsdp (0.6.1), private names included, so that an upgrade has one place to look at.

What it is: the parameters of a unit lie in one flat buffer, cut over the ranks between rows. The modules hold "raw"
parameters, views of gathered buffers, while the model runs; the optimizer has "distributed" ones, DTensors over this
rank's part of the buffer that holds the main weights, and these stand in the modules outside of a step.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from automodel_trainer.distributed._dtensor import flatten_mesh
from automodel_trainer.nn.uneven import mark_uneven
from automodel_trainer.strategies.megatron.even_shards import over_tp, part_shape, unstage

OUTER, SHARD, TP = "dp_outer", "dp_shard_cp", "tp"
_INSTEAD = "Use strategy='fsdp2', which shards the same way (ZeRO-3) with torch alone."
Wrapper = Any  # megatron_fsdp.MegatronFSDP


def check_available(device: torch.device) -> None:
    """Raises ValueError without CUDA or without the package."""
    if importlib.util.find_spec("megatron_fsdp") is None:
        raise ValueError(
            "strategy='megatron_fsdp' needs the package megatron-fsdp: pip install 'automodel-trainer[megatron]'. "
            + _INSTEAD
        )
    if device.type != "cuda":
        raise ValueError(f"strategy='megatron_fsdp' runs on NVIDIA GPUs only, and this run is on {device}. {_INSTEAD}")


def check_nccl_ub() -> None:
    """Raises ValueError where nothing can register NCCL user buffers."""
    for name in ("megatron.core.nccl_allocator", "apex.contrib.nccl_allocator"):
        try:
            if importlib.util.find_spec(name) is not None:
                return
        except ImportError:
            continue
    raise ValueError("nccl_ub=True needs megatron-core's or apex's nccl_allocator, and neither is installed.")


@dataclass(frozen=True)
class Options:
    """What is asked of the package.

    Args:
        zero_stage: 1: optimizer state is sharded; 2: gradients too; 3: parameters too; 0: nothing is.
        outer_zero_stage: 1: optimizer state is sharded over replicas of the model as well.
        compute_dtype: of the gathered parameters.
        main_dtype: of the weights that the optimizer updates; None: the parameters themselves are updated.
        grads_dtype: that gradients are accumulated in; None: that of the parameters.
        reduce_dtype: that gradients travel in; None: as they are accumulated.
    """

    zero_stage: int = 3
    outer_zero_stage: int = 0
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    double_buffer: bool = False
    nccl_ub: bool = False
    compute_dtype: torch.dtype = torch.float32
    main_dtype: torch.dtype | None = None
    grads_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None

    def arguments(self, mesh: DeviceMesh) -> dict[str, Any]:
        """Those of `fully_shard_model`, for a mesh `([dp_outer,] dp_shard_cp, tp)`."""
        from megatron_fsdp import MixedPrecisionPolicy

        names = mesh.mesh_dim_names or ()
        replicated = OUTER in names
        return {
            "device_mesh": mesh,
            "dp_shard_dim": SHARD,
            "tp_dim": TP,  # also of size 1: the package asks for it whenever a parameter is no DTensor
            "dp_outer_dim": OUTER if replicated else None,
            "hybrid_fsdp_group": flatten_mesh(mesh[OUTER, SHARD], "hsdp").get_group() if replicated else None,
            "zero_dp_strategy": self.zero_stage,
            "outer_dp_sharding_strategy": self.outer_zero_stage,
            "mixed_precision_policy": MixedPrecisionPolicy(
                main_params_dtype=self.main_dtype,
                main_grads_dtype=self.grads_dtype,
                # Over a single rank the package would add what it has cast to what it has cast it from.
                grad_comm_dtype=self.reduce_dtype if mesh[SHARD].size() > 1 else None,
            ),
            "overlap_grad_reduce": self.overlap_grad_reduce,
            "overlap_param_gather": self.overlap_param_gather,
            "fsdp_double_buffer": self.double_buffer,
            "nccl_ub": self.nccl_ub,
            "sync_model_each_microbatch": False,
            "calculate_per_token_loss": True,  # gradients are summed over ranks
            "preproc_state_dict_for_dcp_ckpt": False,  # `uneven` says where shards lie, without asking other ranks
        }


def wrapper_of(model: nn.Module) -> Wrapper | None:
    """What shards `model`, by the attribute that the package stamps on parameters; None before `shard_model`."""
    return getattr(next(model.parameters(), None), "_megatron_fsdp_model", None)


def shard_model(
    model: nn.Module, mesh: DeviceMesh, units: list[type[nn.Module]], options: Options, device: torch.device
) -> Wrapper:
    """Move the values of a staged model (see `staging`) into the package's buffers, in place.

    Parameters first become empty, then the package cuts them, then each gets its values: those of the main weights in
    their own precision, and never more than one parameter in full.
    """
    from megatron_fsdp import fully_shard_model

    staged = dict(model.named_parameters())
    shapes = {name: part_shape(value) for name, value in staged.items()}
    _check_dimensions(shapes)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    _empty_parameters(model, options, device)
    with _empty_resets(model), _quiet():
        wrapper = fully_shard_model(
            model,
            fsdp_unit_modules=units,
            init_model_with_meta_device=options.zero_stage > 0,
            device=device,
            **options.arguments(mesh),
        )
    for name, parameter in model.named_parameters():
        _fill(parameter, unstage(staged.pop(name)), mesh)
    refresh(wrapper)
    model.register_forward_pre_hook(lambda *_: wrapper._replace_param_with_raw_if_needed(), prepend=True)
    return wrapper


def _check_dimensions(shapes: dict[str, torch.Size]) -> None:
    scalars = [name for name, shape in shapes.items() if not shape]
    if scalars:
        raise ValueError(f"megatron_fsdp cannot shard parameters without a dimension: {scalars[0]}. Use 'fsdp2'.")


def _empty_parameters(model: nn.Module, options: Options, device: torch.device) -> None:
    """Meta parameters in the dtype that is computed in, for the package to make real unit by unit.

    Tied ones are made real here: the package would make a second one of each. With tensor parallel a part that is cut
    becomes a plain tensor marked as Megatron's own layers mark theirs (of a DTensor cut by columns the package gets the
    local shape wrong). A replica stays a DTensor, by which a forward knows that its gradient may need a sum, and is
    made real too: the package loses track of DTensors on meta.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    kept: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, key))
                kept[id(parameter)] = parameter
    for number, parameter in kept.items():
        placement = over_tp(parameter)
        tp_mesh = parameter.device_mesh[TP]  # type: ignore[attr-defined]
        replica = isinstance(placement, Replicate) and tp_mesh.size() > 1
        real = len(owners[number]) > 1 or options.zero_stage == 0 or replica
        dtype = options.compute_dtype if parameter.is_floating_point() else parameter.dtype
        value: Tensor = torch.empty(part_shape(parameter), dtype=dtype, device=device if real else "meta")
        if replica:
            value = DTensor.from_local(value, tp_mesh, [placement], run_check=False)
        empty: Any = nn.Parameter(value, requires_grad=parameter.requires_grad)
        if isinstance(placement, Shard) and tp_mesh.size() > 1:
            empty._tensor_parallel_mode = "column" if placement.dim == 0 else "row"
        for module, key in owners[number]:
            module._parameters[key] = empty


@contextmanager
def _empty_resets(model: nn.Module) -> Iterator[None]:
    """Making a module real, the package empties its buffers too, and calls `reset_parameters`: few modules have one."""
    holders = [module for module in model.modules() if module._parameters]
    buffers = [dict(module._buffers) for module in holders]
    for module in holders:
        module.reset_parameters = _nothing  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, saved in zip(holders, buffers):
            module.__dict__.pop("reset_parameters", None)
            module._buffers.update(saved)


def _nothing() -> None:
    pass


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex.*")
        yield


def _fill(parameter: Any, value: Tensor, mesh: DeviceMesh) -> None:
    """Write this rank's rows of `value` (whole, or the tensor-parallel part) into a distributed parameter."""
    local = parameter._local_tensor
    cut = getattr(parameter, "megatron_fsdp_slice", slice(0, value.numel()))  # elements, in the flat parameter
    first = cut.start // math.prod(value.shape[1:]) if local.numel() else 0
    with torch.no_grad():
        local.copy_(value[first : first + local.shape[0]])
    offsets = [first] + [0] * (value.ndim - 1)
    for dim, size in enumerate(value.shape):
        if size != parameter.shape[dim]:  # cut by tensor parallel
            offsets[dim] += size * mesh.get_local_rank(TP)
    if parameter.device_mesh.size() > 1:
        mark_uneven(parameter, offsets)


# --- one optimizer step ---------------------------------------------------------------------------------------------


def begin_backward(wrapper: Wrapper) -> None:
    """Between forward and backward. The package's own hook finds no tensor in outputs that are a dataclass."""
    wrapper.pre_backward()


def end_backward(wrapper: Wrapper, model: nn.Module) -> None:
    """After backward: gradients of tied and unused parameters, and every module's state."""
    from megatron_fsdp.megatron_fsdp import TrainingState

    wrapper.post_backward()
    for module in model.modules():  # those outside of units would stay in backward, and gather nothing ahead
        module.__dict__["_training_state"] = TrainingState.IDLE


def finish_gradients(wrapper: Wrapper) -> None:
    """Wait for reduced gradients and give them to the distributed parameters, which return to their modules."""
    wrapper.finish_grad_sync()
    if not wrapper.ddp_config.overlap_param_gather:
        wrapper.synchronize_param_gather()  # else updated weights would never be gathered again


def use_distributed(wrapper: Wrapper) -> None:
    """Put the distributed parameters in their modules: what optimizers, checkpoints and exports are given."""
    wrapper._replace_param_with_distributed_if_needed()


def refresh(wrapper: Wrapper) -> None:
    """After the distributed parameters were written to: the model computes with the new values."""
    wrapper.install_optimized_model_weights()
    wrapper.synchronize_param_gather()


def shard_optimizer(optimizer: Optimizer) -> None:
    """Let `optimizer` (over distributed parameters) install what it updated and clear the gradient buffers.

    The package would take a step of its own here so that there is state: it decays weights and counts as a step. State
    comes with the first real step, or with a checkpoint. And it would synchronize gradients once more in every step,
    past the clipping.
    """
    from megatron_fsdp import fully_shard_optimizer

    scheduled = getattr(optimizer.step, "_wrapped_by_lr_sched", False)
    optimizer.step = _nothing  # type: ignore[method-assign, assignment]
    fully_shard_optimizer(optimizer, preproc_state_dict_for_dcp_ckpt=False)
    package_step: Any = optimizer.step

    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        self._opt_called = True  # type: ignore[attr-defined]  # what a learning-rate schedule asks
        return package_step(*args, sync_grad_before_optimizer_step=False, **kwargs)

    if scheduled:
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step.__get__(optimizer)  # type: ignore[method-assign]
