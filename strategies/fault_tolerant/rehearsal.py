"""A step that runs before anybody waits for it, so that a group has warmed up when it meets the others.

It pays what a process pays only once: imports, compilation, the first use of kernels and of memory, connections within
the group. Afterwards everything is as if no step had been run: parameters, optimizer states, gradients, random numbers,
buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from automodel_trainer.data.global_batch import GlobalBatch
from automodel_trainer.data.loader import MicroBatchLoader
from automodel_trainer.distributed.phase import during_phase
from automodel_trainer.strategies.base.mesh_strategy import MeshStrategy
from automodel_trainer.strategies.base.objective import MicroBatch, count_all
from automodel_trainer.strategies.base.trials import unchanged
from automodel_trainer.strategies.fault_tolerant.gradients import sum_gradients
from automodel_trainer.strategies.fault_tolerant.state import local, trained


def rehearse(strategy: MeshStrategy, trainer: pl.Trainer) -> None:
    """Run the largest step of the data once, and leave no trace of it. Collective over the group.

    Data that cannot tell their largest step are not rehearsed. Callbacks that try steps before the first one do it now.
    """
    build: Any = getattr(trainer.datamodule, "build_train_loader", None)  # type: ignore[attr-defined]
    loader = None if build is None else build()
    if not isinstance(loader, MicroBatchLoader):
        return
    objective: Any = trainer.lightning_module
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        getattr(callback, "before_peers", _nothing)(trainer, objective, loader)
    with during_phase("rehearsal"), unchanged(objective):
        for step in _steps(strategy, loader):
            batch = [strategy.batch_to_device(micro_batch) for micro_batch in step]
            tokens = strategy.sum_over_rows(count_all(objective, batch))
            with strategy.precision_plugin.train_step_context():
                strategy.forward_backward(objective, batch, tokens)
            sum_gradients(trained(objective.model), _nothing)
            strategy.clip_grad_norm_(trained(objective.model), None)
            for optimizer in strategy.optimizers:
                _step_little(optimizer)
            for parameter in objective.parameters():
                parameter.grad = None


def _steps(strategy: MeshStrategy, loader: MicroBatchLoader) -> Iterator[Sequence[MicroBatch]]:
    """The largest step; and where rows have many widths, another one: code is compiled for any width in the second."""
    yield from loader.largest_steps()
    if strategy.compiles and not loader.has_one_width:
        batch: GlobalBatch = next(loader.steps())
        batch.deal(strategy.dp_rank, strategy.dp_size)
        yield batch[:1]


def _step_little(optimizer: Optimizer) -> None:
    """Step with the smallest parameter of each group alone. Its kernels are those of a whole step."""
    for group in optimizer.param_groups:
        given = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in sorted(given, key=Tensor.numel)[1:]:
            parameter.grad = None
    with _undone(optimizer), suppress(Exception):  # one that cannot step yet says so in the first step, if at all
        optimizer.step()


@contextmanager
def _undone(optimizer: Optimizer) -> Iterator[None]:
    """A context after which an optimizer and its parameters that have a gradient are as they were before."""
    touched = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    values = [local(parameter.detach()).clone() for parameter in touched]
    numbers = {id(parameter) for parameter in touched}
    before = set(optimizer.state)
    kept = {
        key: _copy(state)
        for key, state in optimizer.state.items()
        if id(key) in numbers or not isinstance(key, Tensor)  # or what is no parameter's
    }
    settings = [
        {name: deepcopy(value) for name, value in group.items() if name != "params" and not isinstance(value, Tensor)}
        for group in optimizer.param_groups
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(touched, values):
                local(parameter.detach()).copy_(value)
        for key in set(optimizer.state) - before:
            del optimizer.state[key]
        optimizer.state.update(kept)
        for group, old in zip(optimizer.param_groups, settings):
            group.update(old)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy(inner) for name, inner in value.items()}
    return value.clone() if isinstance(value, Tensor) else deepcopy(value)


def _nothing(*_: Any) -> None:
    pass
