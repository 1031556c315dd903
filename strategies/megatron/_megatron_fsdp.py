"""Every use of megatron-fsdp (0.6.1), including private names, so that an upgrade has one file to check.

How the package works: the parameters of a unit lie in one flat buffer, which is cut over ranks between rows. While the
model runs, modules hold "raw" parameters, which are views of gathered buffers. The optimizer holds "distributed"
parameters, which are DTensors over this rank's part of the buffer of main weights. Outside of a step the modules hold
these as well.
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
from automodel_trainer.strategies.megatron.even_shards import gather_even, over_tp, part_shape

OUTER, SHARD, TP = "dp_outer", "dp_shard_cp", "tp"
_INSTEAD = "Use strategy='fsdp2', which shards the same way (ZeRO-3) with torch alone."
Wrapper = Any  # megatron_fsdp.MegatronFSDP


def check_available(device: torch.device) -> None:
    """Check that Megatron-FSDP can run here.

    Raises:
        ValueError: the package is not installed, or `device` is not a GPU.
    """
    if importlib.util.find_spec("megatron_fsdp") is None:
        raise ValueError(
            "strategy='megatron_fsdp' needs the package megatron-fsdp: pip install 'automodel-trainer[megatron]'. "
            + _INSTEAD
        )
    if device.type != "cuda":
        raise ValueError(f"strategy='megatron_fsdp' runs on NVIDIA GPUs only, and this run is on {device}. {_INSTEAD}")


def check_nccl_ub() -> None:
    """Check that a library that registers NCCL user buffers is installed.

    Raises:
        ValueError: there is none.
    """
    for name in ("megatron.core.nccl_allocator", "apex.contrib.nccl_allocator"):
        try:
            if importlib.util.find_spec(name) is not None:
                return
        except ImportError:  # `find_spec` imports the parent package, which may be missing
            continue
    raise ValueError(
        "nccl_ub=True needs the nccl_allocator of megatron-core or apex, and neither is installed. Install one, or set "
        "nccl_ub=False."
    )


@dataclass(frozen=True)
class Options:
    """The options of the package.

    Args:
        zero_stage: what is sharded. 0: nothing; 1: optimizer state; 2: gradients too; 3: parameters too.
        outer_zero_stage: 1: optimizer state is also sharded over replicas of the model.
        overlap_grad_reduce, overlap_param_gather, double_buffer, nccl_ub: see `MegatronFSDPStrategy`.
        compute_dtype: dtype of the gathered parameters.
        main_dtype: dtype of the weights that the optimizer updates; None: it updates the parameters themselves.
        grads_dtype: dtype that gradients are accumulated in; None: that of the parameters.
        reduce_dtype: dtype that gradients are reduced in; None: the one they are accumulated in.
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
        """The arguments of `fully_shard_model`, for a mesh `([dp_outer,] dp_shard_cp, tp)`."""
        from megatron_fsdp import MixedPrecisionPolicy

        names = mesh.mesh_dim_names or ()
        replicated = OUTER in names
        return {
            "device_mesh": mesh,
            "dp_shard_dim": SHARD,
            "tp_dim": TP,  # even if its size is 1: the package needs it whenever a parameter is not a DTensor
            "dp_outer_dim": OUTER if replicated else None,
            "hybrid_fsdp_group": flatten_mesh(mesh[OUTER, SHARD], "hsdp").get_group() if replicated else None,
            "zero_dp_strategy": self.zero_stage,
            "outer_dp_sharding_strategy": self.outer_zero_stage,
            "mixed_precision_policy": MixedPrecisionPolicy(
                main_params_dtype=self.main_dtype,
                main_grads_dtype=self.grads_dtype,
                # On a single rank the package would add the cast gradient to the one that it was cast from.
                grad_comm_dtype=self.reduce_dtype if mesh[SHARD].size() > 1 else None,
            ),
            "overlap_grad_reduce": self.overlap_grad_reduce,
            "overlap_param_gather": self.overlap_param_gather,
            "fsdp_double_buffer": self.double_buffer,
            "nccl_ub": self.nccl_ub,
            "sync_model_each_microbatch": False,
            "calculate_per_token_loss": True,  # sum gradients over ranks instead of averaging them
            "preproc_state_dict_for_dcp_ckpt": False,  # `nn/uneven.py` records where shards lie, without a collective
        }


def wrapper_of(model: nn.Module) -> Wrapper | None:
    """The package's object that shards `model`; None before `shard_model`. The package notes it on each parameter."""
    return getattr(next(model.parameters(), None), "_megatron_fsdp_model", None)


def shard_model(
    model: nn.Module, mesh: DeviceMesh, units: list[type[nn.Module]], options: Options, device: torch.device
) -> Wrapper:
    """Move the values of a model with even shards (see `even_shards.py`) into the package's buffers, in place.

    The parameters are replaced by empty ones, the package shards these, and then each gets its values. Main weights get
    them in their own precision. No more than one parameter is ever held in full.

    Args:
        mesh: `([dp_outer,] dp_shard_cp, tp)`.
        units: classes of the modules that are gathered together, the blocks.
        options: see `Options`.
        device: this rank's GPU.

    Raises:
        ValueError: a parameter has no dimension, or tensor parallel cuts it in a way that the package cannot shard.
    """
    from megatron_fsdp import fully_shard_model

    even = dict(model.named_parameters())
    shapes = {name: part_shape(value) for name, value in even.items()}
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
        _fill(parameter, gather_even(even.pop(name)), mesh)  # `pop` frees the even shard
    refresh(wrapper)
    # The package does this only in its own forward, and we call the model's.
    model.register_forward_pre_hook(lambda *_: wrapper._replace_param_with_raw_if_needed(), prepend=True)
    return wrapper


def _check_dimensions(shapes: dict[str, torch.Size]) -> None:
    scalars = [name for name, shape in shapes.items() if not shape]
    if scalars:
        raise ValueError(f"megatron_fsdp cannot shard the 0-dim parameter {scalars[0]}. Use strategy='fsdp2'.")


def _empty_parameters(model: nn.Module, options: Options, device: torch.device) -> None:
    """Replace parameters by meta ones in the compute dtype, which the package makes real unit by unit.

    There are three exceptions:
    - Tied parameters become real here: the package would make a second copy of each.
    - Under tensor parallel, a cut parameter becomes a plain tensor, marked the way Megatron's own layers mark theirs.
      The package gets the local shape of a DTensor cut by columns wrong.
    - Under tensor parallel, a replicated parameter stays a DTensor, so that a forward can tell that its gradient may
      need a sum. It becomes real here too: the package loses track of DTensors on meta.
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
    """Protect buffers and stub out `reset_parameters` while the package makes modules real.

    It empties a module's buffers along with its parameters, then calls `reset_parameters`, which few modules have.
    """
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
    """Hide the package's warning that it runs without Transformer Engine and Apex."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex.*")
        yield


def _fill(parameter: Any, value: Tensor, mesh: DeviceMesh) -> None:
    """Write this rank's rows of `value` (the whole tensor, or its tensor-parallel part) into a distributed parameter.

    Args:
        value: `[n, …]`.
        mesh: `([dp_outer,] dp_shard_cp, tp)`.
    """
    local = parameter._local_tensor
    cut = getattr(parameter, "megatron_fsdp_slice", slice(0, value.numel()))  # in elements of the flattened parameter
    first = cut.start // math.prod(value.shape[1:]) if local.numel() else 0  # buffers are cut between rows
    with torch.no_grad():
        local.copy_(value[first : first + local.shape[0]])
    offsets = [first] + [0] * (value.ndim - 1)
    for dim, size in enumerate(value.shape):
        if size != parameter.shape[dim]:  # tensor parallel cut this dimension
            offsets[dim] += size * mesh.get_local_rank(TP)
    if parameter.device_mesh.size() > 1:
        mark_uneven(parameter, offsets)


# --- one optimizer step ---------------------------------------------------------------------------------------------


def begin_backward(wrapper: Wrapper) -> None:
    """Call it between forward and backward. The package's own hook finds no tensors in outputs that are a dataclass."""
    wrapper.pre_backward()


def end_backward(wrapper: Wrapper, model: nn.Module) -> None:
    """Call it after backward. It handles gradients of tied and unused parameters, and resets every module's state."""
    from megatron_fsdp.megatron_fsdp import TrainingState

    wrapper.post_backward()
    # The package resets modules inside units only. Others would stay in "backward", and then prefetch nothing.
    for module in model.modules():
        module.__dict__["_training_state"] = TrainingState.IDLE


def finish_gradients(wrapper: Wrapper) -> None:
    """Wait for the reduced gradients and attach them to the distributed parameters, which return to their modules."""
    wrapper.finish_grad_sync()
    if not wrapper.ddp_config.overlap_param_gather:
        wrapper.synchronize_param_gather()  # otherwise updated weights would never be gathered again


def use_distributed(wrapper: Wrapper) -> None:
    """Put the distributed parameters into the modules, for optimizers, checkpoints and exports."""
    wrapper._replace_param_with_distributed_if_needed()


def refresh(wrapper: Wrapper) -> None:
    """Make the model use new values of the distributed parameters. Call it after writing to them."""
    wrapper.install_optimized_model_weights()
    wrapper.synchronize_param_gather()


def shard_optimizer(optimizer: Optimizer) -> None:
    """Make `optimizer` (over distributed parameters) install updated weights and clear the gradient buffers.

    Two things that the package does are turned off. It would take a step here to create optimizer state, which decays
    weights and counts as a step; state is created by the first real step or by a checkpoint. It would also reduce
    gradients again in every step, after they were clipped.
    """
    from megatron_fsdp import fully_shard_optimizer

    scheduled = getattr(optimizer.step, "_wrapped_by_lr_sched", False)
    optimizer.step = _nothing  # type: ignore[method-assign, assignment]
    fully_shard_optimizer(optimizer, preproc_state_dict_for_dcp_ckpt=False)
    package_step: Any = optimizer.step

    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        self._opt_called = True  # type: ignore[attr-defined]  # a learning-rate schedule checks it
        return package_step(*args, sync_grad_before_optimizer_step=False, **kwargs)

    if scheduled:
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step.__get__(optimizer)  # type: ignore[method-assign]
