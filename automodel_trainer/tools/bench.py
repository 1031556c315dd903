"""`amt bench`: measure the speed of a run's configuration."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback

from automodel_trainer.callbacks import BatchPreview, HFExport, Ledger, SampleGenerations
from automodel_trainer.callbacks.layout import max_over_ranks, trained_model
from automodel_trainer.callbacks.throughput import GIB, peak_resident_set
from automodel_trainer.lightning_cli import build
from automodel_trainer.nn.flops import flops_per_token, holds_language_model, peak_flops
from automodel_trainer.strategies import MeshStrategy
from automodel_trainer.tools.bench_ceilings import AttentionShape, Ceilings, measure_ceilings
from automodel_trainer.tools.bench_profile import STEPS, Kernel, ProfileSteps, table
from automodel_trainer.tools.bench_report import Work, efficiency, results, text
from automodel_trainer.tools.bench_steps import BatchWatch, StepClock

# Callbacks that write into the run's folder or print: they are not part of a training step.
_LEFT_OUT = (Checkpoint, ProgressBar, SaveConfigCallback, BatchPreview, HFExport, Ledger, SampleGenerations)
_MOST_TOKENS = 16384  # maximum size of the measured attention


class Bench(Callback):
    """Measures the device before the first step, and combines the results after the last.

    Args:
        clock: times the steps.

    Attributes:
        found: the results, the same on every rank.
    """

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self.found: dict[str, Any] = {}
        self._ceilings: Ceilings | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what the device can reach, if there is a language model to compare with."""
        model, device = trained_model(trainer), trainer.strategy.root_device
        if holds_language_model(model):
            strategy = trainer.strategy
            dtype = strategy.dtypes.compute if isinstance(strategy, MeshStrategy) else torch.float32
            self._ceilings = measure_ceilings(device, dtype, _attention_shape(trainer, model))
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Combine the results. Collective.

        Raises:
            ValueError: the run ended before a step was measured.
        """
        clock, device, world = self.clock, trainer.strategy.root_device, trainer.world_size
        if not clock.seconds:
            raise ValueError(
                f"The run ended after {trainer.global_step} optimizer step(s), before one was measured: lower --warmup "
                f"(now {clock.warmup}), or use more data or epochs."
            )
        found = results(clock.seconds, clock.warmup_seconds, clock.data_seconds, clock.totals, world)
        held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_set()
        memory = max_over_ranks(trainer, torch.tensor(float(held), dtype=torch.float64, device=device))
        found |= {"peak_memory_gib": float(memory) / GIB, "device": _device_name(device), "devices": world}
        if self._ceilings is not None and clock.totals.tokens:
            model, speed = trained_model(trainer), found["tokens_per_second_per_device"]
            matmul = flops_per_token(model, 0.0)
            attention = flops_per_token(model, clock.totals.mean_document()) - matmul
            matmul += clock.totals.tower_kflops * 1e3 / clock.totals.tokens
            found |= efficiency(speed, Work(matmul, attention), self._ceilings, peak_flops(device))
        self.found = found


def bench(
    trainer: pl.Trainer, module: Any, data: Any, *, warmup: int = 5, steps: int = 20, profile: Path | None = None
) -> dict[str, Any]:
    """Run `warmup` + `steps` optimizer steps and measure the last `steps` of them.

    The run does not validate, log to a logger, or write anything except the profile.

    Args:
        trainer: a Trainer. It cannot be used for anything else afterwards.
        module: as for `trainer.fit`.
        data: as for `trainer.fit`.
        warmup: number of steps that do not count (compilation, allocation, autotuning).
        steps: number of steps to measure.
        profile: a folder for a profile of `STEPS` more steps: a trace, and a table and a picture of the largest
            kernels. None: no profile.

    Returns:
        The results. Their names include the units.

    Raises:
        ValueError: the data ends before a step was measured, or before the profile is complete.
    """
    clock = StepClock(warmup, steps, STEPS if profile else 0)
    measured = Bench(clock)
    given: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    kept = [callback for callback in given if not isinstance(callback, _LEFT_OUT)]
    profiler = [ProfileSteps(profile, warmup + steps)] if profile else []
    # The clock comes after the callbacks that are kept, because their time is part of a step.
    trainer.callbacks = [BatchWatch(clock), *kept, clock, measured, *profiler]  # type: ignore[attr-defined]
    trainer.loggers = []
    if 0 <= trainer.max_steps < (needed := warmup + steps + clock.extra):
        trainer.fit_loop.epoch_loop.max_steps = needed
    trainer.limit_val_batches = trainer.num_sanity_val_steps = 0
    trainer.fit(module, data)
    found = measured.found
    if profiler:
        found["kernels"] = [kernel._asdict() for kernel in profiler[0].kernels]
    return found


def _attention_shape(trainer: pl.Trainer, model: torch.nn.Module) -> AttentionShape:
    """The shape of the model's attention on the run's rows, limited to `_MOST_TOKENS`."""
    config = next(m.config for m in model.modules() if hasattr(getattr(m, "config", None), "get_text_config"))
    config = config.get_text_config()  # type: ignore[union-attr, operator]
    data = getattr(trainer, "datamodule", None)
    length = min(int(getattr(data, "seq_len", None) or 2048), _MOST_TOKENS)
    rows = max(1, min(int(getattr(data, "micro_batch_size", None) or 1), _MOST_TOKENS // length))
    heads = int(config.num_attention_heads)  # type: ignore[union-attr, arg-type]
    width = getattr(config, "head_dim", None) or config.hidden_size // heads  # type: ignore[union-attr, operator]
    return AttentionShape(rows, heads, length, int(width))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main(argv: Sequence[str]) -> None:
    """The command line.

    Raises:
        ValueError: a number of steps is less than 1, or the run ended too early.
    """
    parser = argparse.ArgumentParser(
        prog="amt bench",
        description="Measure the training steps of a run's configuration: time, tokens per second, MFU, memory.",
        epilog="All other options are those of `amt fit`: --config FILE, --trainer.strategy fsdp2, …",
    )
    parser.add_argument("--warmup", type=int, default=5, help="optimizer steps before the measurement (default: 5)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps to measure (default: 20)")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write a trace and the ten largest kernels")
    parser.add_argument("--json", action="store_true", help="print the results as one line of JSON")
    own, rest = parser.parse_known_args(argv)
    if own.warmup < 1 or own.steps < 1:
        raise ValueError(f"--warmup {own.warmup} --steps {own.steps}: both must be at least 1.")
    trainer, module, data = build(rest)
    found = bench(trainer, module, data, warmup=own.warmup, steps=own.steps, profile=own.profile)
    if not trainer.is_global_zero:
        return
    if own.json:
        print(json.dumps(found))
        return
    print(f"\n{found['devices']} × {found['device']}\n{text(found)}")
    if own.profile:
        print(f"\n{table([Kernel(**kernel) for kernel in found['kernels']])}\nTrace and picture in {own.profile}")


if __name__ == "__main__":
    main(sys.argv[1:])
