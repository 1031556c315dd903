"""Compare pipeline schedules with FSDP2 and with a single stage: a llama-8B-shaped model on 2 GPUs, same global batch.

`python benchmarks/pipeline_vs_fsdp2.py` runs the cases one after another, each in its own processes, within `--limit`
seconds in total. Each case prints a line of JSON when it ends (or the last output of its ranks if it fails), followed
by the table so far. `--small` makes the model small enough for CPU ranks. `--cases` chooses cases and their order.

A step is the forward and backward of `--micro-batches` micro-batches of 2 × 4,096 random tokens, clipping and AdamW.
The first two steps do not count. The default is `--precision bf16` (fp32 master weights).

Look at these columns of a pipeline's row:
- `of one stage`: tokens per second divided by (1 − predicted bubble) × those of the case `one stage`. That case runs
  the most expensive stage alone on one GPU with the same micro-batches: the speed of a GPU that never waits. The goal
  is 95 % or more.
- `of its own`: the same relative to the speed at which the pipeline's own stages compute: tokens divided by the mean
  seconds that its ranks compute in a step, both without the optimizer. It separates waiting from slower computation.
- `measured` bubble: the share of forward and backward in which ranks compute nothing, mean over ranks and steps.
  `predicted` is computed from the schedule and the weights of the stages.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # layouts.py beside this file

import torch
from cases import report, reported
from layouts import EIGHT_B, TINY, RandomModel
from lightning.pytorch.callbacks import Callback

from automodel_trainer import MockDataModule, Trainer
from automodel_trainer.callbacks import Throughput
from automodel_trainer.strategies.pipeline.split import balanced_counts, find_parts, layer_costs

CASES = {
    "pp, 1f1b": ("3d:pp=2,split=auto", 2),
    "fsdp2": ("fsdp2", 2),
    "one stage": ("fsdp2:reshard_after_forward=false", 1),  # as in a pipeline: cast once per step
    "pp, interleaved": ("3d:pp=2,schedule=interleaved_1f1b,split=auto", 2),
    "pp, zbv": ("3d:pp=2,schedule=zbv,split=auto", 2),
    "pp, 1f1b, even": ("3d:pp=2", 2),
    "pp, 1f1b, eager": ("3d:pp=2,split=auto,compile=false", 2),
}
ROWS, WARM = 2, 2


class Steps(Callback):
    """Seconds of every step. For a pipeline, also the seconds that this rank computed, and those of its schedule."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.pipeline: list[tuple[float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        _synchronize()
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        _synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        if (pipeline := getattr(trainer.strategy, "pipeline", None)) is not None:
            self.pipeline.append(pipeline.clock.seconds())
        print(f"step {trainer.global_step}: {self.seconds[-1]:.2f} s", flush=True)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one case on this rank."""
    strategy, ranks = CASES[case]
    shape = {**(TINY if args.small else EIGHT_B), "num_hidden_layers": 8 if args.small else 32}
    model = RandomModel(shape, lr=1e-5, scheduler="constant")
    if case == "one stage":
        (whole,) = model._reference
        costs, first, last = layer_costs(whole, find_parts(whole))
        shape["num_hidden_layers"] = balanced_counts(costs, first, last, 2)[-1]
        model = RandomModel(shape, lr=1e-5, scheduler="constant")
    length = 64 if args.small else 4096
    # a pipeline of two ranks runs all micro-batches on both; fsdp2 runs half of them on each
    data = MockDataModule(
        shape["vocab_size"],
        seq_len=length,
        micro_batch_size=ROWS,
        global_batch_size=ROWS * args.micro_batches,
        num_samples=ROWS * args.micro_batches * args.steps,
    )
    steps, throughput = Steps(), Throughput()
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu" if args.small else "gpu",
        devices=ranks,
        precision=args.precision,
        max_steps=args.steps,
        log_every_n_steps=args.steps - 1,
        default_root_dir=args.root,
        callbacks=[steps, throughput],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    trainer.fit(model, data)
    tokens = ROWS * args.micro_batches * length
    result: dict[str, Any] = {
        "tokens_per_second": round(tokens / median(steps.seconds[WARM:]), 1),
        "step_s": [round(s, 3) for s in steps.seconds],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if torch.cuda.is_available() else 0.0,
        "layers": shape["num_hidden_layers"],
    }
    result |= {name: round(throughput.last[name], 4) for name in ("mfu",) if name in throughput.last}
    describe = getattr(trainer.strategy, "describe_pipeline", lambda _: None)(args.micro_batches)
    if describe is not None:
        counted = steps.pipeline[WARM:]
        result |= {"predicted_bubble": round(describe["bubble"], 4), "layers": describe["layers"]}
        result |= {"busy_s": mean(busy for busy, _ in counted), "pipeline_s": mean(whole for _, whole in counted)}
    return result


# --- the parent -------------------------------------------------------------------------------------------------------


def launch(case: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a case in processes for at most `seconds`. Returns their results, or the end of their output."""
    _, ranks = CASES[case]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, files = [], []
    for rank in range(ranks):
        env = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
        files.append(Path(args.root) / f"{list(CASES).index(case)}-{rank}.txt")
        command = [sys.executable, __file__, *sys.argv[1:], "--case", case, "--root", args.root]
        with files[-1].open("w") as output:
            processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env))
    deadline = time.monotonic() + seconds
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    late = time.monotonic() > deadline
    for process in processes:
        process.kill()
        process.wait()
    texts = [file.read_text(errors="replace") for file in files]
    found = [result for text in texts for result in reported(text)]
    if len(found) < ranks:
        why = f"longer than {seconds:.0f} s" if late else "a rank failed"
        return {"failed": why, "output": [text[-2500:] for text in texts]}
    return together(found)


def together(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine the results of the ranks."""
    result = {**results[0], "peak_gib": [r["peak_gib"] for r in results]}
    if "busy_s" in result:
        result["busy_s"] = [round(r["busy_s"], 3) for r in results]
        result["pipeline_s"] = [round(r["pipeline_s"], 3) for r in results]
        result["bubble"] = round(mean(1 - r["busy_s"] / r["pipeline_s"] for r in results), 4)
    return result


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The results as a Markdown table."""
    lines = [
        "| case | layers | tokens/s | peak GiB | MFU | bubble: measured | predicted | of one stage | of its own |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    alone = results.get("one stage", {}).get("tokens_per_second")
    for case, r in results.items():
        if "failed" in r:
            lines.append(f"| {case} | {r['failed']} | | | | | | | |")
            continue
        measured, predicted = r.get("bubble"), r.get("predicted_bubble")
        of_alone = r["tokens_per_second"] / (1 - predicted) / alone if alone and predicted is not None else None
        of_own = (1 - measured) / (1 - predicted) if measured is not None and predicted is not None else None
        shares = [f"{v:.1%}" if v is not None else "" for v in (r.get("mfu"), measured, predicted, of_alone, of_own)]
        peaks = ", ".join(str(peak) for peak in r["peak_gib"])
        lines.append(f"| {case} | {r['layers']} | {r['tokens_per_second']:,.0f} | {peaks} | {' | '.join(shares)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model on CPU ranks")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES)[:4])
    parser.add_argument("--precision", default="bf16", help="bf16 keeps fp32 master weights; bf16-true does not")
    parser.add_argument("--micro-batches", type=int, default=8, help="of two rows, per step of a pipeline")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--limit", type=float, default=150, help="seconds for all cases")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        report(run(args.case, args))
        return
    results: dict[str, dict[str, Any]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as args.root:
        for case in args.cases:
            left = args.limit - (time.monotonic() - began)
            if left < 10:
                print(f"{case}: no time left of {args.limit:.0f} s", flush=True)
                continue
            results[case] = launch(case, args, left)
            output = results[case].pop("output", [])
            print(f"{time.monotonic() - began:.0f} s", case, json.dumps(results[case]), *output, sep="\n", flush=True)
            print("\n".join(["", f"torch {torch.__version__}", *table(results), ""]), flush=True)


if __name__ == "__main__":
    main()
