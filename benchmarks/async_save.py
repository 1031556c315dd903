"""Measure how long training waits for a checkpoint, with synchronous and with async saves.

python benchmarks/async_save.py                                       # CPU, a 50M-shaped model
python benchmarks/async_save.py --model 1b --seq-len 2048             # a GPU: 1B, all parameters (16 GB per checkpoint)
python benchmarks/async_save.py --model 8b --lora 16 --seq-len 2048   # a GPU: 8B, LoRA
torchrun --nproc-per-node 2 benchmarks/async_save.py --model 1b       # several GPUs, fsdp2

Weights are random and created on the device. `--root` should be on the disk for checkpoints, with room for two of them.
Each command takes about `--seconds`: half for synchronous saves, half for async saves. It prints a line for each save.
The last line is a row of the table in docs/resume.md: `async save` should be the time of a copy to host memory, a small
part of `save`, and `step meanwhile` should be close to `step`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from transformers import AutoModelForCausalLM as Reference
from transformers import LlamaConfig, PreTrainedModel

from automodel_trainer import AutoModelForCausalLM, CausalLMModule, LoRAConfig, MockDataModule, Trainer
from automodel_trainer.callbacks import DCPCheckpoint

_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
SAVES = 5  # without the first one
PATIENCE = 10.0  # maximum delay of the second save, in seconds
SHAPES: dict[str, dict[str, Any]] = {
    "50m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 32000}
    | {"num_attention_heads": 8, "num_key_value_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256} | _HEADS,
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256} | _HEADS,
}


class RandomModel(CausalLMModule):
    def __init__(self, shape: dict[str, Any], **kwargs: Any) -> None:
        with torch.device("meta"):
            super().__init__(Reference.from_config(LlamaConfig(**shape)), **kwargs)
        self.shape = shape

    def _build(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(LlamaConfig(**self.shape), self.strategy, seed=1, lora=self.lora)


class Clock(Callback):
    """Measures seconds from the start of each step to the next, with device syncs. Ends the run in time."""

    def __init__(self, saver: TimedCheckpoint, end: float) -> None:
        self.saver, self.end = saver, end
        self.starts: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.starts.append(_now())

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        late, saves = time.perf_counter() - self.end, len(self.saver.saves)
        enough = saves > SAVES or (saves > 1 and late > 0) or (saves and late > PATIENCE)
        trainer.should_stop = trainer.strategy.broadcast(bool(enough))


class TimedCheckpoint(DCPCheckpoint):
    """Saves a number of steps after the previous checkpoint is complete, so that no save waits for another.

    It records when each save began, when training continued and, on rank 0, when the checkpoint was complete.
    """

    def __init__(self, every: int, **options: Any) -> None:
        super().__init__(every_n_steps=10**9, **options)
        self.every, self.steps = every, 0
        self.saves: list[tuple[float, float]] = []
        self.whole: list[float] = []

    def _is_due(self, trainer: Any) -> bool:
        self.steps = self.steps + 1 if len(self.whole) == len(self.saves) else 0
        return bool(trainer.strategy.broadcast(self.steps >= self.every))

    def _save(self, trainer: Any, pl_module: Any) -> bool:
        self.steps, begun = 0, _now()
        saved = super()._save(trainer, pl_module)
        if saved:
            self.saves.append((begun, _now()))
            if trainer.is_global_zero:
                print(f"  step {trainer.global_step}: training waited {self.saves[-1][1] - begun:.2f} s", flush=True)
        return saved

    def _on_whole(self, folder: Path) -> None:
        super()._on_whole(folder)
        self.whole.append(time.perf_counter())


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run(args: argparse.Namespace, root: Path, background: bool) -> dict[str, Any]:
    end = time.perf_counter() + args.seconds / 2
    saver = TimedCheckpoint(args.every, keep_last=1, async_save=background, save_at_end=False)
    data = MockDataModule(
        vocab_size=SHAPES[args.model]["vocab_size"],
        seq_len=args.seq_len,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size,
        num_samples=args.global_batch_size * 1000,
    )
    trainer = Trainer(
        strategy=args.strategy,
        precision=args.precision,
        max_steps=1000,
        callbacks=[clock := Clock(saver, end), saver],
        default_root_dir=root,
        enable_progress_bar=False,
        enable_ledger=False,
        logger=False,
    )
    lora = LoRAConfig(rank=args.lora) if args.lora else None
    trainer.fit(RandomModel(SHAPES[args.model], lora=lora, lr=1e-5), data)
    return summary(clock.starts, saver, _size(root / "checkpoints")) if trainer.is_global_zero else {}


def summary(starts: list[float], saver: TimedCheckpoint, size: int) -> dict[str, Any]:
    """Seconds per step with and without a write in flight, per save, and until a checkpoint is complete."""
    writing = [(begun, whole) for (begun, _), whole in zip(saver.saves, saver.whole)]
    quiet, busy = [], []
    for start, end in list(pairwise(starts))[2:]:  # the first steps allocate and compile
        pause = sum(done - begun for begun, done in saver.saves if start <= begun < end)
        overlapping = any(start < whole and end > begun for begun, whole in writing)
        (busy if overlapping else quiet).append(end - start - pause)
    stalls = [done - begun for begun, done in saver.saves]
    return {
        "checkpoint_bytes": size,
        "step_s": _median(quiet or busy),
        "step_while_writing_s": _median(busy or quiet),
        "stalls_s": stalls,
        "first_stall_s": stalls[0],  # includes the allocation of host memory
        "stall_s": _median(stalls[1:] or stalls),
        "whole_after_s": _median(whole - begun for begun, whole in writing),
    }


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def _size(run: Path) -> int:
    latest = run / "latest"
    return sum(file.stat().st_size for file in latest.resolve().rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="50m")
    parser.add_argument("--lora", type=int, default=0, help="rank of the adapters; 0 trains all parameters")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--precision", default=None, help="by default bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=2)
    parser.add_argument("--every", type=int, default=10, help="steps between a checkpoint that is whole and a save")
    parser.add_argument("--seconds", type=float, default=90, help="a save that has begun then is still waited for")
    parser.add_argument("--root", type=Path, default=None)
    args = parser.parse_args()
    if args.root is not None:
        args.root.mkdir(parents=True, exist_ok=True)
    args.precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    base = Path(tempfile.mkdtemp(dir=args.root))
    result = {}
    try:
        for name, background in (("sync", False), ("async", True)):
            result[name] = run(args, base / name, background)
            shutil.rmtree(base / name, ignore_errors=True)  # the disk may not have room for both
            print(name, json.dumps(result[name]), flush=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if result["sync"]:  # only on rank 0
        report(args, **result)


def report(args: argparse.Namespace, sync: dict[str, Any], **rest: Any) -> None:
    background = rest["async"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    what = f"LoRA {args.lora}" if args.lora else "all parameters"
    print(
        f"\n| {device} | {args.model}, {what} | {sync['checkpoint_bytes'] / 1e9:.2f} GB | {sync['step_s']:.3f} | "
        f"{sync['stall_s']:.2f} | {background['first_stall_s']:.2f} | {background['stall_s']:.2f} | "
        f"{background['step_while_writing_s']:.3f} | {background['whole_after_s']:.1f} |"
    )


if __name__ == "__main__":
    main()
