"""Every private name of Lightning that the project uses (lightning 2.6.6). Check this file after an upgrade."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import safetensors.torch
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.core import saving
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop as EpochLoop
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.strategies.ddp import _DDPForwardRedirection
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher, _WorkerOutput
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector as CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.argparse import _defaults_from_env_vars
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_only as utilities_rank_zero_only
from torch import Tensor
from torch.optim.swa_utils import get_swa_avg_fn

__all__ = [
    "DDPForwardRedirection",
    "NotebookLauncher",
    "SubprocessLauncher",
    "answer_requeue_signal",
    "as_automatic",
    "assigned_checkpoint",
    "attached_trainer",
    "average_one_by_one",
    "call_hook",
    "count_step",
    "defaults_from_env_vars",
    "drop_advertisement",
    "dump_state",
    "forget_optimizers",
    "end_ranks_on_sigterm",
    "hpc_checkpoint",
    "install_checkpoint_connector",
    "install_quiet_epoch_loop",
    "keep_quiet_about_trees",
    "last_checkpoints",
    "next_hpc_checkpoint",
    "prepare_for_backward",
    "read_more_in_load_from_checkpoint",
    "sync_rank_zero",
    "synchronize_layers",
    "uncompiled",
]

defaults_from_env_vars = _defaults_from_env_vars
DDPForwardRedirection = _DDPForwardRedirection
SubprocessLauncher = _SubprocessScriptLauncher


@contextmanager
def as_automatic(module: pl.LightningModule) -> Iterator[None]:
    """A context in which Lightning reads all keys of a module's schedules: of manual optimization it drops some."""
    before, module.automatic_optimization = module.automatic_optimization, True
    try:
        yield
    finally:
        module.automatic_optimization = before


def call_hook(trainer: pl.Trainer, name: str, *args: Any) -> None:
    """Call a hook of all callbacks and of the module, as Lightning's loops do."""
    call._call_callback_hooks(trainer, name, *args)
    call._call_lightning_module_hook(trainer, name, *args)


def sync_rank_zero(rank: int) -> None:
    """Set the rank of this process in every copy of Lightning's `rank_zero_only`."""
    for helper in (rank_zero_only, utilities_rank_zero_only, fabric_rank_zero_only):
        helper.rank = rank  # type: ignore[attr-defined]


def average_one_by_one(callback: WeightAveraging) -> None:
    """Let a callback without a function of its own average one tensor after the other.

    On a GPU torch averages lists of tensors with a weight that is a tensor, which sharded tensors do not take.
    """
    if callback._kwargs.get("avg_fn") is None and callback._kwargs.get("multi_avg_fn") is None:
        callback._kwargs["avg_fn"] = get_swa_avg_fn()


class NotebookLauncher(_MultiProcessingLauncher):
    """Runs `fit` in forked or spawned workers.

    Lightning would send the module's state dict back through pickle, which fails for sharded tensors. The caller gets
    the path of the checkpoint instead (`Trainer.fit` returns it), and the weights of a module of its own that every
    worker holds whole.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Run `function` in all workers, and return what rank 0 returns.

        Raises:
            ValueError: forked workers could not use their GPU, because CUDA is initialized in this process.
        """
        if self._start_method == "fork" and self._strategy.root_device.type == "cuda" and torch.cuda.is_initialized():
            raise ValueError(
                "CUDA is initialized in this process, and then forked ranks cannot use it. Restart the kernel. Import "
                "automodel_trainer before transformers and torchao, put no tensor or model on a GPU before fit, and "
                "ask torch.cuda only for is_available() and device_count(). Or run a script: amt fit, torchrun."
            )
        return super().launch(function, *args, trainer=trainer, **kwargs)

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether a notebook can use this launcher: only with forked workers."""
        return self._start_method == "fork"

    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> _WorkerOutput | None:
        if self._strategy.local_rank != 0:
            return None
        extra = self.get_extra_results(trainer)
        callback = trainer.checkpoint_callback
        extra["weights"] = getattr(self._strategy, "whole_weights", lambda: None)()
        state = {name: getattr(callback, name) for name in _CHECKPOINT_STATE if _settable(callback, name)}
        # A tensor would be sent as a file of this process, which may have ended before the caller opens it.
        extra["checkpoint"] = apply_to_collection(state, Tensor, _Number)
        return _WorkerOutput(None, None, trainer.state, results, extra)

    def _recover_results_in_main_process(self, worker_output: _WorkerOutput, trainer: pl.Trainer) -> None:
        trainer.state = worker_output.trainer_state
        self.update_main_process_results(trainer, worker_output.extra)
        weights = worker_output.extra["weights"]
        if weights is not None:
            trainer.lightning_module.load_state_dict(safetensors.torch.load(weights), strict=False)
        state = apply_to_collection(worker_output.extra["checkpoint"], _Number, _Number.tensor)
        for name, value in state.items():
            setattr(trainer.checkpoint_callback, name, value)


class _Number:
    """A 0-dim tensor as plain data."""

    def __init__(self, tensor: Tensor) -> None:
        self.value, self.dtype = tensor.item(), tensor.dtype

    def tensor(self) -> Tensor:
        """The tensor, on the CPU."""
        return torch.tensor(self.value, dtype=self.dtype)


# Attributes in which a checkpoint callback, ours or Lightning's, remembers the checkpoints that it wrote.
_CHECKPOINT_STATE = ("run_folder", "scores", "last_model_path", "best_model_path", "best_model_score")


def _settable(callback: Any, name: str) -> bool:
    return hasattr(callback, name) and not isinstance(getattr(type(callback), name, None), property)


class _TrainingEpochLoop(EpochLoop):
    """Lightning's epoch loop without its SIGTERM broadcast. Profilers name entries after it, so it has the same name.

    It also moves those schedules of an objective that the objective's step does not move itself (`moves`). To Lightning
    that step is manual optimization, in which it moves none.

    Lightning broadcasts rank 0's SIGTERM flag before every batch and waits for the device to read it. The `Preemption`
    callback lets ranks agree on a stop without waiting, and any rank may get the signal.
    """

    def _broadcast_sigterm_tensor(self) -> None:
        pass

    def _update_learning_rates(self, interval: str, update_plateau_schedulers: bool) -> None:
        module, strategy = self.trainer.lightning_module, self.trainer.strategy
        moves = getattr(module, "moves", None)
        configs = strategy.lr_scheduler_configs
        left = configs if moves is None else [config for config in configs if not moves(config)]
        if moves is None or not left:
            super()._update_learning_rates(interval, update_plateau_schedulers)
            return
        strategy.lr_scheduler_configs = left
        try:
            with as_automatic(module):
                super()._update_learning_rates(interval, update_plateau_schedulers)
        finally:
            strategy.lr_scheduler_configs = configs


def drop_advertisement() -> None:
    """Drop the product hint that Lightning logs whenever a Trainer is created."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not logger.filters:
        logger.addFilter(lambda record: "litlogger" not in record.getMessage().lower())


def keep_quiet_about_trees() -> None:
    """Ignore torch 2.13's warning about how Lightning 2.6.6 tests for a `LeafSpec`: users can do nothing about it."""
    warnings.filterwarnings(
        "ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning, r"lightning\.pytorch\.utilities\._pytree"
    )


def install_quiet_epoch_loop(trainer: pl.Trainer) -> None:
    """Replace the Trainer's training epoch loop by `_QuietEpochLoop`. Call it before the first run."""
    old = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = _TrainingEpochLoop(trainer, min_steps=old.min_steps, max_steps=old.max_steps)


def end_ranks_on_sigterm(trainer: pl.Trainer) -> None:
    """Let SIGTERM end this process and those that it started, if there are several ranks. Call it before the first run.

    Lightning's handler broadcasts a tensor, whatever collective the signal interrupts: the ranks wait for each other
    forever. While the `Preemption` callback trains, its handler is there in place of this one.
    """
    connector = trainer._signal_connector
    handler = partial(_end_ranks, trainer, connector._sigterm_notifier_fn)
    connector._sigterm_notifier_fn = handler  # type: ignore[method-assign,assignment]


def _end_ranks(trainer: pl.Trainer, of_one_rank: Callable[[int, Any], None], signum: int, frame: Any) -> None:
    if trainer.world_size == 1:
        of_one_rank(signum, frame)
        return
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signal.Signals(signum))
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def read_more_in_load_from_checkpoint(reads: Callable[[Any], bool], read: Callable[[Any, Any], dict[str, Any]]) -> None:
    """Let `load_from_checkpoint` of every LightningModule and data module read another kind of checkpoint.

    Args:
        reads: whether a path is of that kind. For all others nothing changes.
        read: reads a checkpoint; it gets the path and `map_location`.
    """
    theirs = saving.pl_load

    def load(path_or_url: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        if reads(path_or_url):
            return read(path_or_url, map_location)
        return theirs(path_or_url, map_location=map_location, weights_only=weights_only)

    saving.pl_load = load


def assigned_checkpoint(trainer: pl.Trainer) -> Any:
    """The checkpoint that a user set by `trainer.ckpt_path = …`, which `fit` restores; None if nobody did."""
    return trainer.ckpt_path if trainer._checkpoint_connector._user_managed else None


def answer_requeue_signal(trainer: pl.Trainer, handler: Callable[[int, Any], None]) -> None:
    """Let `handler` answer Slurm's requeue signal. Lightning would save in the middle of a step, on its own rank."""
    trainer._signal_connector._slurm_sigusr_handler_fn = handler  # type: ignore[method-assign,assignment]


def hpc_checkpoint(trainer: pl.Trainer) -> str | None:
    """The newest `hpc_ckpt_*.ckpt` in `default_root_dir`, as Lightning finds it."""
    return trainer._checkpoint_connector._hpc_resume_path


def next_hpc_checkpoint(trainer: pl.Trainer) -> str:
    """The path of the next `hpc_ckpt_*.ckpt`."""
    return trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)


class _CheckpointConnector(CheckpointConnector):
    """Lightning's connector, which looks for `hpc_ckpt_*` in `fit` alone.

    Lightning's `test(model)` in a Slurm job tests the weights of such a checkpoint and not those of `model`.
    """

    @property
    def _hpc_resume_path(self) -> str | None:
        evaluates = self.trainer.state.fn is not None and self.trainer.state.fn != TrainerFn.FITTING
        return None if evaluates and self.trainer.state.status == TrainerStatus.RUNNING else super()._hpc_resume_path

    def restore_training_state(self) -> None:
        """Restore loops, optimizers and schedules; then what other replica groups have that are further."""
        super().restore_training_state()
        ask = getattr(self.trainer.strategy, "state_of_peers", None)
        further = ask(self._loaded_checkpoint) if ask and self.trainer.state.fn == TrainerFn.FITTING else None
        if further is None:
            return
        self._loaded_checkpoint = further
        call._call_lightning_module_hook(self.trainer, "on_load_checkpoint", further)
        self.restore_datamodule()
        self.restore_callbacks()
        super().restore_training_state()


def install_checkpoint_connector(trainer: pl.Trainer) -> None:
    """Replace the Trainer's checkpoint connector. Call it before the first run."""
    trainer._checkpoint_connector = _CheckpointConnector(trainer)


def dump_state(trainer: pl.Trainer) -> dict[str, Any]:
    """The state of loops, callbacks, schedules and data, as a checkpoint holds it. Hooks of callbacks run."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def count_step(optimizer: LightningOptimizer) -> None:
    """Count a step of manual optimization that `optimizer` did not make itself. Call it in `training_step`."""
    optimizer._on_before_step()
    optimizer._on_after_step()


def attached_trainer(module: pl.LightningModule | None) -> pl.Trainer | None:
    """The Trainer that a module is attached to; None if there is none yet."""
    return None if module is None else module._trainer


def last_checkpoints(trainer: pl.Trainer) -> set[str]:
    """What Lightning takes for the last checkpoints of its own callbacks, wherever they were written."""
    found = {getattr(callback, "ckpt_path", None) for callback in trainer.checkpoint_callbacks}  # OnExceptionCheckpoint
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            found |= callback._find_last_checkpoints(trainer)
    return {path for path in found if path}


def uncompiled(model: Any) -> Any:
    """The LightningModule inside what `torch.compile` made of one; anything else as it is."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, pl.LightningModule) else model


def forget_optimizers(strategy: pl.strategies.Strategy) -> None:
    """Drop the optimizers and schedulers of an earlier run from `strategy`."""
    strategy._reset_optimizers_and_schedulers()


def synchronize_layers(strategy: pl.strategies.ParallelStrategy, module: pl.LightningModule) -> None:
    """Make batch norms of `module` synchronize over ranks, if the Trainer was asked for it (`sync_batchnorm=True`)."""
    if strategy._layer_sync is not None:
        strategy._layer_sync.apply(module)
