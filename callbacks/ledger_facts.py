"""The facts of the ledger: a description of the run as plain data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from transformers import PreTrainedModel

from automodel_trainer.callbacks.continue_run import ContinueRun, changed_rows
from automodel_trainer.callbacks.counts import Counts, micro_batches
from automodel_trainer.callbacks.garbage_collection import GarbageCollection
from automodel_trainer.callbacks.layout import dp_size, max_over_ranks
from automodel_trainer.callbacks.watchdog import Watchdog
from automodel_trainer.data.base import MicroBatchDataModule
from automodel_trainer.distributed._dtensor import local_tensor
from automodel_trainer.models._transformers import (
    attention_in_use,
    experts_in_use,
    tied_weight_names,
    unused_balancing_loss,
)
from automodel_trainer.models.kernels import KernelsInUse, kernels_in_use
from automodel_trainer.models.lora import describe_lora, starts_without_gradient
from automodel_trainer.models.parts import describe_frozen
from automodel_trainer.models.quantization.fp8_layers import fp8_layers
from automodel_trainer.models.quantization_config import ReadDense
from automodel_trainer.models.record import recorded
from automodel_trainer.models.stage_names import of_all_stages
from automodel_trainer.modules.balance import Balanced
from automodel_trainer.modules.idle_parameters import IdleParameters
from automodel_trainer.nn.tensor_bytes import bytes_of
from automodel_trainer.strategies import MeshStrategy
from automodel_trainer.strategies.base.allocator import allocator_of
from automodel_trainer.strategies.base.compile import effective_options

Facts = dict[str, Any]


def gradient_facts(trainer: pl.Trainer, model: nn.Module) -> Facts:
    """Facts about the gradients, before the optimizer steps. Collective; waits for the device.

    A rank's shard of a parameter may be empty. A gradient therefore counts as missing, or as zero, only if it is so on
    all ranks.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = {name: local_tensor(p.grad) for name, p in trained.items() if p.grad is not None}
    device = trainer.strategy.root_device
    silent = of_all_stages(model, {name: starts_without_gradient(model, name) for name in trained})
    seen = torch.zeros(2, len(silent), device=device)
    for index, name in enumerate(silent):
        if name in grads:
            seen[0, index] = 1
            # NaN counts as nonzero: the check for finite losses reports it.
            seen[1, index] = (grads[name] != 0).any()
    there, nonzero = max_over_ranks(trainer, seen).bool().tolist()
    return {
        "tensors": len(silent),
        "missing": [name for name, has in zip(silent, there) if not has],
        "all_zero": [name for name, has, some in zip(silent, there, nonzero) if has and not some and not silent[name]],
        "bytes": bytes_by_dtype(grads.values()),
    }


def model_facts(trainer: pl.Trainer, model: nn.Module) -> Facts:
    """Facts about the model: class, source, parameters, ties, attention, kernels, adapters. Collective."""
    parameters = list(model.parameters())
    # The numel of a DTensor is that of the whole tensor.
    sizes = of_all_stages(model, {name: (p.requires_grad, p.numel()) for name, p in model.named_parameters()})
    inner = _transformers_models(model)
    pairs = [(name, source, tied) for m in inner for name, source, tied in tied_pairs(m)]
    kernels = next((used for m in inner if (used := kernels_in_use(m)).texts), KernelsInUse())
    return {
        "class": _class_name(inner[0] if len(inner) == 1 else model),
        "source": str(getattr(trainer.lightning_module, "source", None) or "") or None,
        "trained": sum(numel for trained, numel in sizes.values() if trained),
        "frozen": sum(numel for trained, numel in sizes.values() if not trained),
        "bytes": bytes_by_dtype(local_tensor(p) for p in parameters),
        "tied": [f"{name} = {source}" for name, source, tied in pairs if tied],
        "untied": [f"{name} ≠ {source}" for name, source, tied in pairs if not tied],
        "attention": sorted({attention_in_use(m) for m in inner}),
        "kernels": kernels.texts,
        "kernel_costs": kernels.costs(compiled_with(trainer.strategy)["compile"] is not None),
        "experts": next((text for m in inner if (text := _experts(m))), None),
        "fp8": next((str(layers) for m in inner if (layers := fp8_layers(m))), None),
        "read_dense": next((read.method for m in inner if (read := recorded(m, ReadDense))), None),
        "frozen_parts": next((text for m in inner if (text := describe_frozen(m))), None),
        "idle": next((list(idle.names) for m in inner if (idle := recorded(m, IdleParameters))), []),
        "lora": next((text for m in inner if (text := describe_lora(m))), None),
    }


def tied_pairs(model: PreTrainedModel) -> list[tuple[str, str, bool]]:
    """Pairs of parameters that the config ties.

    Returns:
        (name, name of the source, whether they are the same parameter). Replaced modules are left out.
    """
    pairs = []
    for name, source in tied_weight_names(model).items():
        try:
            pairs.append((name, source, model.get_parameter(name) is model.get_parameter(source)))
        except AttributeError:  # the module was replaced by an adapter that trains its own copy of the head
            continue
    return pairs


def optimizer_facts(trainer: pl.Trainer, module: pl.LightningModule, model: nn.Module) -> Facts:
    """Facts about the optimizers: class, state, schedule, and trainable parameters that are in none of them."""
    optimizers = trainer.optimizers
    states = [value for optimizer in optimizers for value in _state_tensors(optimizer)]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    first = groups[0] if groups else {}
    given = {id(parameter) for group in groups for parameter in group["params"]}
    return {
        "class": ", ".join(type(optimizer).__name__ for optimizer in optimizers),
        "fused": bool(first.get("fused")),
        "lr": float(first.get("initial_lr", first.get("lr", 0.0))),
        "weight_decay": float(max((group.get("weight_decay") or 0.0 for group in groups), default=0)),
        "bytes": bytes_by_dtype(states),
        "left_out": [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in given],
        "schedule": _schedule(trainer, module),
    }


def low_precision_state(optimizers: Iterable[Optimizer]) -> list[str]:
    """Names of the half-precision dtypes in the optimizer state."""
    dtypes = {tensor.dtype for optimizer in optimizers for tensor in _state_tensors(optimizer)}
    return sorted(_name(dtype) for dtype in dtypes & {torch.bfloat16, torch.float16})


def run_facts(trainer: pl.Trainer, batch: Any) -> Facts:
    """Facts about the run: layout, batch sizes, steps, data and checkpoints."""
    strategy = trainer.strategy
    checkpoint: Any = trainer.checkpoint_callback
    arithmetic = batch_facts(trainer, batch)
    describe = getattr(strategy, "describe_pipeline", None)
    folder = getattr(checkpoint, "run_folder", None) or getattr(checkpoint, "dirpath", None)
    return {
        "strategy": type(strategy).__name__,
        "mesh": _mesh(strategy) if isinstance(strategy, MeshStrategy) else {},
        "world_size": trainer.world_size,
        "device": _device_name(strategy.root_device),
        "precision": str(trainer.precision),
        "activation_checkpointing": strategy.block_modes if isinstance(strategy, MeshStrategy) else None,
        "budget": _budget(strategy),
        "offloaded": _offloaded(strategy),
        "tiled": _tiled(strategy),
        **compiled_with(strategy),
        "batch": arithmetic,
        "pipeline": describe(arithmetic["accumulation"]) if describe is not None else None,
        "steps": planned_steps(trainer),
        "steps_per_epoch": _steps_per_epoch(trainer),
        "max_epochs": trainer.max_epochs,
        "data": _data(trainer),
        "rows": _rows(trainer),
        "watchdog": next((c.silence for c in trainer.callbacks if isinstance(c, Watchdog) and c.active), None),  # type: ignore[attr-defined]
        "allocator": allocator_of(strategy.root_device) if isinstance(strategy, MeshStrategy) else None,
        "garbage_collection": next(
            (c.every_n_steps for c in trainer.callbacks if isinstance(c, GarbageCollection) and c.active),  # type: ignore[attr-defined]
            0,
        ),
        "checkpoints": str(folder) if folder else None,
        "resumed": resumed_facts(trainer),
        "returned": _returned(strategy),
    }


def _budget(strategy: Any) -> Facts | None:
    """What a memory budget has chosen, and what a step took."""
    chosen = strategy.chosen if isinstance(strategy, MeshStrategy) else None
    if chosen is None:
        return None
    return {"given": strategy.memory.given, **asdict(chosen), "text": str(chosen)}


def _returned(strategy: Any) -> str | None:
    """What it cost that this replica group came back; None if it did not."""
    returned = getattr(strategy, "returned", None)
    return None if returned is None else str(returned)


def _offloaded(strategy: Any) -> Facts | None:
    """Bytes of host memory that hold inputs of blocks, the most allowed, and for what that was enough."""
    host = strategy.prepared.host if isinstance(strategy, MeshStrategy) else None
    if host is None or not host.limit:
        return None
    return {"bytes": host.held, "limit": host.limit, "full": host.full, "again": host.again, "results": host.results}


def _tiled(strategy: Any) -> Facts | None:
    """How many MLPs are computed in tiles, and in how many."""
    if not isinstance(strategy, MeshStrategy) or strategy.tiles is None:
        return None
    return {"mlps": len(strategy.prepared.tiled), "tiles": strategy.tiles}


def resumed_facts(trainer: pl.Trainer) -> Facts | None:
    """The checkpoint that the run goes on from, its step and what has changed; None for a new run."""
    run = next((callback for callback in trainer.callbacks if isinstance(callback, ContinueRun)), None)  # type: ignore[attr-defined]
    if run is None or run.checkpoint is None:
        return None
    return {
        "checkpoint": str(run.checkpoint),
        "step": run.step,
        "takes": run.resume,
        "changes": {change.name: [change.then, change.now] for change in run.changes},
        "rows": changed_rows(run.changes),
    }


def compiled_with(strategy: Any) -> Facts:
    """The backend that blocks are compiled with, and its options; None if blocks are not compiled."""
    if not (isinstance(strategy, MeshStrategy) and strategy.prepared.compiled):
        return {"compile": None, "compile_options": None}
    backend = strategy.compile_backend
    return {"compile": backend, "compile_options": effective_options(backend, strategy.compile_options)}


def batch_facts(trainer: pl.Trainer, batch: Any) -> Facts:
    """Rows per micro-batch, micro-batches per step and rank, data-parallel ranks, and rows and tokens per step."""
    parts: Sequence[Any] = micro_batches(batch) or [batch]
    counts = Counts()
    counts.add(parts[0])
    first = counts.totals()
    dp = dp_size(trainer) * getattr(trainer.strategy, "groups_met", 1)
    accumulation = len(parts) * trainer.accumulate_grad_batches
    widest = max((m["input_ids"].shape[-1] for m in parts if _has_tokens(m)), default=0)
    rows = first.rows * accumulation * dp
    return {"micro": first.rows, "accumulation": accumulation, "dp": dp, "global": rows, "tokens": rows * widest}


def planned_steps(trainer: pl.Trainer) -> int | None:
    """Number of optimizer steps of the run; None if it is not known."""
    ask = getattr(trainer, "planned_steps", None)
    if ask is not None:
        return ask()
    steps = trainer.estimated_stepping_batches
    return int(steps) if steps not in (-1, float("inf")) else None


def bytes_by_dtype(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Bytes of local tensors of any shape, by the names of their dtypes (or classes, for quantized tensors)."""
    sums: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        quantized = hasattr(tensor, "__tensor_flatten__")
        sums[type(tensor).__name__ if quantized else _name(tensor.dtype)] += bytes_of(tensor)
    return dict(sums)


def _state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """The state tensors of an optimizer on this rank, without step counters."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [local_tensor(value) for value in values if isinstance(value, Tensor) and value.ndim]


def _schedule(trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
    config = getattr(module, "scheduler_config", None)
    if is_dataclass(config) and not isinstance(config, type):
        options = {k: v for k, v in asdict(config).items() if k != "name" and v and (k != "decay_ratio")}
        return ", ".join([str(getattr(config, "name", "")), *(f"{k} {v:g}" for k, v in options.items())])
    if isinstance(config, str):
        return config
    names = [type(c.scheduler).__name__ for c in trainer.lr_scheduler_configs]
    return ", ".join(names) or None


def _mesh(strategy: MeshStrategy) -> dict[str, int]:
    mesh, ep = strategy.device_mesh, strategy.expert_ranks
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape))
    return {**sizes, "of these ep": ep} if isinstance(ep, int) and ep > 1 else sizes


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _steps_per_epoch(trainer: pl.Trainer) -> int | None:
    batches = trainer.num_training_batches
    return None if batches == float("inf") else max(1, int(batches) // trainer.accumulate_grad_batches)


def _data(trainer: pl.Trainer) -> str:
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    source = datamodule if datamodule is not None else trainer.train_dataloader
    rows = getattr(source, "rows", None)
    train = rows.get("train") if isinstance(rows, Mapping) else None
    try:
        size = f", {len(train):,} rows" if train is not None else ""
    except TypeError:  # a stream
        size = ""
    shares = source.describe_shares() if isinstance(source, MicroBatchDataModule) else []
    mixed = "".join(f"; {line}" for line in shares)
    return type(source).__name__ + size + mixed


def _rows(trainer: pl.Trainer) -> str | None:
    """How documents lie in rows, and what is proved of that; None where nobody knows."""
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    proof = getattr(trainer.lightning_module, "__dict__", {}).get("isolation")  # only if it was asked for
    if not isinstance(datamodule, MicroBatchDataModule) or not datamodule.rows_hold_documents:
        return None if proof is None else str(proof)
    if datamodule.packs:
        return "packed; " + ("not checked: the module is no objective" if proof is None else str(proof))
    why = datamodule.packing_obstacle
    checked = "; checked: a row with padding is as the row alone" if proof is not None and proof.checked else ""
    return f"padded, by length{checked}" + (f"; not packed, because {why}" if why else "")


def _experts(model: PreTrainedModel) -> str | None:
    """What computes the experts and what balances them, or a balancing loss that is configured and not used."""
    if (name := experts_in_use(model)) is None:
        return None
    grouped = "experts" in kernels_in_use(model).texts
    texts = ["grouped" if grouped else f"{name} (transformers' experts_implementation)"]
    if (balanced := recorded(model, Balanced)) is not None:
        texts.append(f"balanced by {balanced.text}")
    elif unused := unused_balancing_loss(model):
        texts.append(f"{unused} is not used: output_router_logits is off")
    return "; ".join(texts)


def _transformers_models(model: nn.Module) -> list[PreTrainedModel]:
    """The outermost transformers models inside `model`."""
    found: list[PreTrainedModel] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module) not in inside:
            found.append(module)
            inside |= {id(m) for m in module.modules()}
    return found


def _class_name(model: nn.Module) -> str:
    """Name of the model's own class. FSDP2 replaces the class by a subclass."""
    return next(cls.__name__ for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def _has_tokens(micro_batch: Any) -> bool:
    return isinstance(micro_batch, Mapping) and isinstance(micro_batch.get("input_ids"), Tensor)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
