"""Throughput: tokens per second, MFU, memory and data wait, measured without making the host wait for the device."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from automodel_trainer.callbacks.counts import Counts, Totals
from automodel_trainer.callbacks.layout import dp_size, max_over_ranks, sum_over_ranks, trained_model
from automodel_trainer.nn.flops import flops_per_token, holds_language_model, peak_flops

GIB = 2**30


class Throughput(Callback):
    """Logs, every `log_every_n_steps` optimizer steps, averages over the steps since the last time:

    | name | unit |
    | --- | --- |
    | `tokens_per_second` | tokens of all devices, padding included, per second |
    | `tokens_per_second_per_device` | the same per device |
    | `samples_per_second` | instead of the two, where batches hold no `input_ids` |
    | `tflops_per_device` | 10¹² FLOP/s of the model's forward and backward (see `flops_per_token`) |
    | `mfu` | the same as a share of the device's dense bf16 peak; only where that peak is known |
    | `peak_memory_gib` | most memory any rank held: allocated on the device, or, on CPU, the process's resident set |
    | `pipeline_bubble` | share of the last step that ranks of a pipeline spent waiting, mean over ranks |
    | `data_wait` | share of the time that the host waited for the next batch |
    | `supervised_share` | share of the tokens that have a label |
    | `padding_share` | share of the tokens that `attention_mask` masks, where there is one |

    The first step (compilation, allocation) does not count, nor does the time of validation and checkpoints. Between
    two log steps nothing waits for the device. On a GPU the host runs ahead of it, so `data_wait` is an upper bound
    there. The numbers of the last log step are in `last`, the tokens of all ranks since the start in `tokens_seen`.

    Args:
        peak_flops: FLOP/s of one device at its best, for a device whose peak is not known or not the dense bf16 one.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"peak_flops={peak_flops}: give the device's FLOP/s, for example 989e12.")
        self.peak_flops = peak_flops
        self._reset()

    def _reset(self) -> None:
        self.last: dict[str, float] = {}
        self.tokens_seen = 0
        self._counts = Counts()
        self._step = 0  # the optimizer step that was seen last
        self._start: float | None = None  # of the window; None until the first step is over
        self._batch_ended: float | None = None
        self._paused_at: float | None = None
        self._paused = 0.0  # seconds of the window that were not training
        self._waited = 0.0  # seconds of the window that the host waited for data

    # --- the clock ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset()
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        now = time.perf_counter()
        if self._paused_at is not None:
            self._paused += now - self._paused_at
        elif self._batch_ended is not None:
            self._waited += now - self._batch_ended
        self._paused_at = self._batch_ended = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        self._pause(trainer)

    def _pause(self, trainer: pl.Trainer) -> None:
        """Stop the clock until the next batch starts; what the device still has to train belongs to training."""
        if self._start is not None and self._paused_at is None:
            _synchronize(trainer.strategy.root_device)
            self._paused_at = time.perf_counter()

    # --- the count ------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._counts.add(batch)
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if stepped and self._start is None:
            self._collect(trainer)
            self._open_window(trainer)
        elif stepped and every and self._step % every == 0:
            _synchronize(trainer.strategy.root_device)
            assert self._start is not None
            seconds = time.perf_counter() - self._start - self._paused
            self.last = self._measure(trainer, self._collect(trainer), seconds)
            pl_module.log_dict(self.last)
            self._open_window(trainer)
        self._batch_ended = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._collect(trainer)

    def _open_window(self, trainer: pl.Trainer) -> None:
        _synchronize(trainer.strategy.root_device)
        self._start = time.perf_counter()
        self._paused = self._waited = 0.0

    def _collect(self, trainer: pl.Trainer) -> Totals:
        """The counts of the window over all ranks. Collective; waits for the device."""
        summed = sum_over_ranks(trainer, self._counts.tensor(trainer.strategy.root_device))
        copies = trainer.world_size // dp_size(trainer)  # ranks that see the same data count it once
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
        achieved = flops_per_token(model, totals.mean_document()) * tokens_per_second
        peak = self.peak_flops or peak_flops(trainer.strategy.root_device)
        return {"tflops_per_device": achieved / 1e12} | ({"mfu": achieved / peak} if peak else {})


def _pipeline_bubble(trainer: pl.Trainer) -> dict[str, float]:
    """Collective where there is a pipeline."""
    measured = getattr(trainer.strategy, "measured_bubble", lambda: None)()
    if measured is None:
        return {}
    summed = sum_over_ranks(trainer, torch.tensor(measured, device=trainer.strategy.root_device))
    return {"pipeline_bubble": float(summed) / trainer.world_size}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(trainer: pl.Trainer) -> float:
    """Bytes, the most of any rank. Collective."""
    device = trainer.strategy.root_device
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_set()
    peak = torch.tensor(held, dtype=torch.int64, device=device)
    return float(max_over_ranks(trainer, peak))


def peak_resident_set() -> int:
    """The most memory this process has held at a time, in bytes."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS gives bytes, Linux KiB
