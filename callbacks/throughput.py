"""Throughput: measure tokens per second, MFU, memory and data wait, without device syncs between log steps."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from automodel_trainer.callbacks.counts import Counts, Totals
from automodel_trainer.callbacks.layout import dp_size, max_over_ranks, sum_over_ranks, tower_work, trained_model
from automodel_trainer.callbacks.rank_times import RankTimes
from automodel_trainer.nn.flops import flops_per_token, holds_language_model, peak_flops
from automodel_trainer.nn.tower_flops import TowerWork

GIB = 2**30


class Throughput(Callback):
    """Logs averages over the last `log_every_n_steps` optimizer steps:

    | name | unit |
    | --- | --- |
    | `tokens_per_second` | tokens of all devices, padding included, per second |
    | `tokens_per_second_per_device` | the same per device |
    | `samples_per_second` | replaces the first two if batches have no `input_ids` |
    | `tflops_per_device` | 10¹² FLOP/s of the model's forward and backward (`flops_per_token`), and of a vision tower |
    | `mfu` | the same as a share of the device's dense bf16 peak, if that peak is known |
    | `peak_memory_gib` | maximum over ranks: memory allocated on the device, or on CPU the resident set size |
    | `pipeline_bubble` | share of the last step that ranks of a pipeline spent waiting, mean over ranks |
    | `data_wait` | share of the time that the host waited for the next batch |
    | `supervised_share` | share of the tokens that have a label |
    | `padding_share` | share of the tokens that `attention_mask` masks, if there is a mask |
    | `slowest_rank` | time outside of collectives of the slowest of several ranks, as a multiple of the median |

    The first step (compilation, allocation) and the time of validation and checkpoints do not count. Only log steps
    wait for the device. On a GPU the host runs ahead of the device, so there `data_wait` is an upper bound. What
    each of several ranks waited and computed is written to `<default_root_dir>/ranks.jsonl` (`amt watch` shows it). A
    rank that takes 1.5 times the median for 20 s, and that the others wait for, is named in a line: `straggler: rank 5
    (host) takes 1.8 × the median …`. So is a GPU that takes 1.5 times the median for the same matrix products.

    Args:
        peak_flops: peak FLOP/s of one device. None: look it up; it must be given for other devices and other dtypes.

    Attributes:
        last: the values of the last log step.
        tokens_seen: number of tokens of all ranks since the start.

    Raises:
        ValueError: `peak_flops` is not positive.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"peak_flops={peak_flops} must be positive: the FLOP/s of a device, for example 989e12.")
        self.peak_flops = peak_flops
        self._reset()

    def _reset(self) -> None:
        self.last: dict[str, float] = {}
        self.tokens_seen = 0
        self._counts = Counts()
        self._tower: TowerWork | None = None
        self._step = 0  # the last optimizer step
        self._start: float | None = None  # start of the window; None until the first step is over
        self._batch_ended: float | None = None
        self._paused_at: float | None = None
        self._paused = 0.0  # seconds of the window that were not training
        self._waited = 0.0  # seconds of the window that the host waited for data
        self._ranks: RankTimes | None = None  # of several ranks each is written down

    # --- the clock ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset all counts."""
        self._reset()
        self._step = trainer.global_step
        self._tower = tower_work(trainer)
        self._ranks = RankTimes(trainer) if trainer.world_size > 1 else None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        """Start the clock again, and count the time that the host waited for data."""
        now = time.perf_counter()
        if self._tower is not None:
            self._tower.counting = True
        if self._paused_at is not None:
            self._paused += now - self._paused_at
            if self._ranks is not None:
                self._ranks.go_on()
        elif self._batch_ended is not None:
            self._waited += now - self._batch_ended
        self._paused_at = self._batch_ended = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._pause(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Stop the clock."""
        self._pause(trainer)

    def _pause(self, trainer: pl.Trainer) -> None:
        """Stop the clock until the next batch starts, after the device has finished its training work."""
        if self._start is not None and self._paused_at is None:
            _synchronize(trainer.strategy.root_device)
            self._paused_at = time.perf_counter()
            if self._ranks is not None:
                self._ranks.pause()

    # --- the count ------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and measure and log at log steps."""
        self._counts.add(batch)
        if self._tower is not None:
            self._counts.add_tower(self._tower.take())
            self._tower.counting = False
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if stepped and self._start is None:
            self._collect(trainer)
            self._open_window(trainer)
        elif stepped and every and self._step % every == 0:
            _synchronize(trainer.strategy.root_device)  # the time of the window must include the device's work
            assert self._start is not None
            seconds = time.perf_counter() - self._start - self._paused
            slowest: dict[str, float] = {}
            if self._ranks is not None:
                held = _held_memory(trainer.strategy.root_device)
                slowest = self._ranks.write(seconds, self._waited, held)
            self.last = self._measure(trainer, self._collect(trainer), seconds) | slowest
            pl_module.log_dict(self.last, batch_size=1)  # of each step; Lightning may not know the batch's size
            self._open_window(trainer)
        self._batch_ended = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the last counts to `tokens_seen`."""
        self._collect(trainer)
        if self._tower is not None:
            self._tower.detach()
            self._tower = None
        self._forget_ranks()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop measuring."""
        self._forget_ranks()

    def _forget_ranks(self) -> None:
        if self._ranks is not None:
            self._ranks.stop()
            self._ranks = None

    def _open_window(self, trainer: pl.Trainer) -> None:
        _synchronize(trainer.strategy.root_device)
        self._start = time.perf_counter()
        self._paused = self._waited = 0.0
        if self._ranks is not None:
            self._ranks.open(self._step)

    def _collect(self, trainer: pl.Trainer) -> Totals:
        """The counts of the window, summed over all ranks. Collective; waits for the device."""
        summed = sum_over_ranks(trainer, self._counts.tensor(trainer.strategy.root_device))
        copies = trainer.world_size // dp_size(trainer)  # so many ranks see the same data, which counts once
        self._counts = Counts()
        totals = Totals(*(int(count) // copies for count in summed.tolist()))
        self.tokens_seen += totals.tokens
        return totals

    def _measure(self, trainer: pl.Trainer, totals: Totals, seconds: float) -> dict[str, float]:
        values = {"peak_memory_gib": _peak_memory(trainer) / GIB, "data_wait": self._waited / seconds}
        values |= _pipeline_bubble(trainer)
        if not totals.tokens:
            return {**values, "samples_per_second": totals.rows / seconds}
        per_device = totals.tokens / seconds / trainer.world_size
        values |= {"tokens_per_second": totals.tokens / seconds, "tokens_per_second_per_device": per_device}
        if totals.labels:
            values["supervised_share"] = totals.supervised / totals.labels
        if totals.masked_tokens:
            values["padding_share"] = totals.padding / totals.masked_tokens
        return values | self._efficiency(trainer, totals, per_device)

    def _efficiency(self, trainer: pl.Trainer, totals: Totals, tokens_per_second: float) -> dict[str, float]:
        model = trained_model(trainer)
        if not holds_language_model(model):
            return {}
        tower = totals.tower_kflops * 1e3 / totals.tokens
        achieved = (flops_per_token(model, totals.mean_document()) + tower) * tokens_per_second
        peak = self.peak_flops or peak_flops(trainer.strategy.root_device)
        return {"tflops_per_device": achieved / 1e12} | ({"mfu": achieved / peak} if peak else {})


def _pipeline_bubble(trainer: pl.Trainer) -> dict[str, float]:
    """The share of the last step that ranks waited, mean over ranks; empty without a pipeline. Collective with one."""
    measured = getattr(trainer.strategy, "measured_bubble", lambda: None)()
    if measured is None:
        return {}
    summed = sum_over_ranks(trainer, torch.tensor(measured, device=trainer.strategy.root_device))
    return {"pipeline_bubble": float(summed) / trainer.world_size}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(trainer: pl.Trainer) -> float:
    """Peak memory in bytes, maximum over ranks. Collective."""
    device = trainer.strategy.root_device
    peak = torch.tensor(_held_memory(device), dtype=torch.int64, device=device)
    return float(max_over_ranks(trainer, peak))


def _held_memory(device: torch.device) -> int:
    """Peak memory of this rank in bytes."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_set()


def peak_resident_set() -> int:
    """The peak resident set size of this process, in bytes."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS gives bytes, Linux KiB
