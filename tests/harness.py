"""A strategy without a Trainer, and the plain one-device reference that every layout is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from automodel_trainer.distributed._dtensor import local_tensor, placeable, shard_offsets
from automodel_trainer.modules.loss import next_token_targets, token_losses
from automodel_trainer.strategies import MeshStrategy, Objective, StrategyRegistry
from automodel_trainer.strategies.base.start import precision_plugin
from tests import pickles
from tests.limits import (
    check_decided,
    check_losses,
    check_run,
    check_step,
    check_steps,
    close,
    computing,
    copy_of,
    gains,
    relative_error,
    widened,
    with_limits,
)
from tests.routers import decided

# Tests have these from here too.
__all__ = [
    "check_decided",
    "check_losses",
    "check_run",
    "check_step",
    "check_steps",
    "close",
    "relative_error",
    "widened",
    "with_limits",
]

Batch = dict[str, Any]
Result = TypeVar("Result")


def make_strategy(spec: str, world_size: int, precision: str = "fp32") -> MeshStrategy:
    """A strategy as the Trainer would have set it up on `world_size` CPU ranks (this process being one of them)."""
    strategy = StrategyRegistry.get(spec)
    assert isinstance(strategy, MeshStrategy)
    strategy.parallel_devices = [torch.device("cpu")] * world_size
    strategy.cluster_environment = TorchElasticEnvironment() if world_size > 1 else LightningEnvironment()
    strategy.accelerator = CPUAccelerator()
    strategy.precision_plugin = precision_plugin(precision)
    strategy.setup_environment()
    return strategy


def adamw(parameters: Iterable[Tensor], lr: float, eps: float) -> torch.optim.AdamW:
    """Fused, as the trainer builds it, but for DTensors: it steps on their shards, as Adam may number by number.

    Given DTensors, torch first looks for one sharding of all, which takes each rank as long as a step of a tiny model.
    """
    return _OfShards(parameters, lr=lr, eps=eps, fused=True)


class _OfShards(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        if not any(isinstance(p, DTensor) for p in self.param_groups[0]["params"]):
            return super().step(closure)
        if not hasattr(self, "inner"):  # FSDP2 may move shards until the first forward
            self.whole = list(self.param_groups[0]["params"])
            parts = [nn.Parameter(local_tensor(p.detach())) for p in self.whole]
            self.inner = torch.optim.AdamW(parts, **{key: self.defaults[key] for key in ("lr", "eps", "fused")})
        parts = self.inner.param_groups[0]["params"]
        for whole, part in zip(self.whole, parts):
            part.grad = None if whole.grad is None else local_tensor(_placed_as(whole, whole.grad))
        self.inner.step()
        self.state.update(zip(self.whole, (self.inner.state[part] for part in parts)))
        return None


def _placed_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        return gradient.redistribute(placements=parameter.placements)
    return gradient


def adamw_of_dtensors(parameters: Iterable[Tensor], lr: float, eps: float) -> torch.optim.AdamW:
    """The trainer's, whose state is laid out as the parameters. One call for all DTensors, and one for the others."""
    groups: dict[bool, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return torch.optim.AdamW([{"params": group} for group in groups.values()], lr=lr, eps=eps, fused=True)


class Stop(Callback):
    """Ends a run after a step of it, as `max_steps` would without changing what depends on the run's length."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


class NextToken(Objective, nn.Module):
    """The smallest objective: a model and the summed next-token loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def split(self, micro_batch: Batch) -> tuple[dict[str, Any], Tensor]:
        inputs = {k: v for k, v in micro_batch.items() if k in ("input_ids", "attention_mask", "position_ids")}
        return {**inputs, "use_cache": False}, next_token_targets(micro_batch["labels"])

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return token_losses(outputs.logits, targets).sum()


def once(function: Callable[..., Result]) -> Callable[..., Result]:
    """Call a function once for the same arguments, which their `repr` tells apart. Nobody may change its results."""
    results: dict[str, Result] = {}

    @wraps(function)
    def found(*args: Any, **kwargs: Any) -> Result:
        key = repr((args, sorted(kwargs.items())))
        if key not in results:
            results[key] = function(*args, **kwargs)
        return results[key]

    return found


def random_rows(rows: int, length: int, seed: int, vocab_size: int = 260) -> list[Batch]:
    """Rows with a third of their labels masked, each row another third; one row has no label at all."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(rows):
        ids = torch.randint(6, vocab_size, (1, length), generator=generator)
        masked = torch.rand(1, length, generator=generator) < (1.0 if index == 2 else 0.2 + 0.1 * (index % 5))
        made.append({"input_ids": ids, "labels": ids.masked_fill(masked, -100)})
    return made


def stack(rows: list[Batch]) -> Batch:
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def reference_step(
    model: PreTrainedModel, rows: list[Batch], optimizer: torch.optim.Optimizer, max_norm: float
) -> dict[str, Any]:
    """One optimizer step of plain torch on one device over all rows at once."""
    batch = stack(rows)
    with decided(model):
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss.item(), "norm": norm.item(), "gradients": gradients}


def full(tensor: Tensor) -> Tensor:
    """The whole of what may be a DTensor. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wholes(tensors: dict[str, Tensor], ranks: int) -> dict[str, Tensor]:
    """Copies of `full` of many tensors, which ranks send each other at once. Collective."""
    if ranks == 1:
        return {name: full(tensor).detach().clone() for name, tensor in tensors.items()}
    split = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor) and _is_in_pieces(tensor)}
    mine = {name: (shard_offsets(tensor), local_tensor(tensor.detach()).clone()) for name, tensor in split.items()}
    sent: list[Any] = [None] * ranks
    dist.all_gather_object(sent, pickles.dumps(mine))
    pieces = [pickles.loads(one) for one in sent]
    found = {}
    for name, tensor in tensors.items():
        if name not in split:
            found[name] = full(tensor).detach().clone()
            continue
        found[name] = torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)
        for rank in _holders(split[name]):
            offsets, piece = pieces[rank][name]
            found[name][tuple(slice(o, o + size) for o, size in zip(offsets, piece.shape))] = piece
    return found


def _is_in_pieces(tensor: DTensor) -> bool:
    """Whether each rank has one piece, and not summands of it or rows from here and there."""
    plain = type(local_tensor(tensor)) in (Tensor, nn.Parameter)
    return plain and not any(p.is_partial() for p in tensor.placements) and placeable(tensor) == tensor.placements


def _holders(tensor: DTensor) -> list[int]:
    """The ranks whose shards are this tensor, and not another copy of it."""
    mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert place is not None
    axes = zip(tensor.placements, place)
    return mesh.mesh[tuple(here if p.is_replicate() else slice(None) for p, here in axes)].flatten().tolist()


def weights_of(model: nn.Module, ranks: int = 1) -> dict[str, Tensor]:
    return wholes(dict(model.named_parameters()), ranks)


def train_steps(
    strategy: MeshStrategy,
    objective: Any,
    optimizer: torch.optim.Optimizer,
    rows: Callable[[int], list[Batch]],
    size: int,
    *,
    steps: int = 3,
    max_norm: float = 0.5,
) -> dict[str, Any]:
    """Optimizer steps on this rank's share of the rows of every step, in micro-batches of `size` rows.

    Returns:
        `history`: loss, gradient norm and whole gradients of every step; `weights`: whole, after the last.
    """
    with computing(objective.model):
        return _train_steps(strategy, objective, optimizer, rows, size, steps, max_norm)


def _train_steps(
    strategy: MeshStrategy,
    objective: Any,
    optimizer: torch.optim.Optimizer,
    rows: Callable[[int], list[Batch]],
    size: int,
    steps: int,
    max_norm: float,
) -> dict[str, Any]:
    model, history = objective.model, []
    for step in range(steps):
        mine = rows(step)[strategy.dp_rank :: strategy.dp_size]
        micro_batches = [stack(mine[i : i + size]) for i in range(0, len(mine), size)]
        tokens = strategy.sum_over_rows(torch.stack([(m["labels"][:, 1:] != -100).sum() for m in micro_batches]).sum())
        loss = strategy.forward_backward(objective, micro_batches, tokens)
        norm = strategy.clip_grad_norm_(model.parameters(), max_norm)
        made = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients = wholes(made, strategy.world_size)
        optimizer.step()
        optimizer.zero_grad()
        total = strategy.sum_over_tokens(loss.clone()) / tokens
        about = about_step(model, optimizer, rows(step)) if strategy.world_size == 1 else {}
        history.append({"loss": total.item(), "norm": norm.item(), "gradients": gradients, **about})
    return {"history": history, "weights": weights_of(model, strategy.world_size)}


def reference_steps(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rows: Callable[[int], list[Batch]],
    *,
    steps: int = 3,
    max_norm: float = 0.5,
) -> dict[str, Any]:
    """What `train_steps` returns, by plain torch on one device over all rows at once, exactly; and its `limits`."""

    def run() -> dict[str, Any]:
        own, own_optimizer = copy_of(model, optimizer)
        history = []
        with computing(own):
            for step in range(steps):
                history.append(reference_step(own, rows(step), own_optimizer, max_norm))
                history[-1] |= about_step(own, own_optimizer, rows(step))
        return {"history": history, "weights": weights_of(own)}

    return with_limits(run)


def about_step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: list[Batch]) -> dict[str, Any]:
    """What the limits of a step's numbers follow from: what is summed, and by how much Adam amplifies."""
    terms = sum(row["input_ids"].numel() for row in rows)
    return {"terms": terms, "lr": optimizer.param_groups[0]["lr"], "gains": gains(model, optimizer)}
