"""A llama-8B-shaped model on 2 GPUs: pipeline schedules against FSDP2 on the same global batch, and against one stage.

`python benchmarks/pipeline_vs_fsdp2.py` runs every case in processes of its own and prints a line of JSON each, then a
table; `--tiny` makes the model small (CPU ranks will do), `--cases` chooses.

What to look at: `tokens_per_second` of a pipeline should be within 5 % of (1 − predicted bubble) × the rate of "one
stage": half of the layers with embedding and head on one GPU, that is, what each of the two GPUs could do if it never
waited. `measured_bubble` is the share of the last step in which ranks computed no stage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # layouts.py beside this file

import torch
from layouts import EIGHT_B, TINY, RandomModel

from automodel_trainer import MockDataModule, Trainer
from automodel_trainer.callbacks import Throughput

CASES = {
    "fsdp2": ("fsdp2", 2),
    "pp, 1f1b": ("3d:pp=2", 2),
    "pp, 1f1b, balanced": ("3d:pp=2,split=auto", 2),
    "pp, interleaved": ("3d:pp=2,schedule=interleaved_1f1b,split=auto", 2),
    "pp, zbv": ("3d:pp=2,schedule=zbv,split=auto", 2),
    "one stage": ("fsdp2", 1),
}
STEPS, WARM = 8, 3


def run(case: str, tiny: bool, precision: str, micro_batches: int, root: str) -> dict[str, Any]:
    """One case on this rank."""
    strategy, ranks = CASES[case]
    shape = dict(TINY if tiny else EIGHT_B)
    shape["num_hidden_layers"] = 4 if tiny else 32
    if case == "one stage":
        shape["num_hidden_layers"] //= 2
    length = 64 if tiny else 4096
    # micro-batches of two rows everywhere: a pipeline of two ranks runs them all on both, fsdp2 half of them on each
    data = MockDataModule(
        shape["vocab_size"],
        seq_len=length,
        micro_batch_size=2,
        global_batch_size=2 * micro_batches,
        num_samples=2 * micro_batches * STEPS,
    )
    throughput = Throughput()
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu" if tiny else "gpu",
        devices=ranks,
        precision=precision,
        max_steps=STEPS,
        log_every_n_steps=STEPS - WARM,
        default_root_dir=root,
        callbacks=[throughput],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    trainer.fit(RandomModel(shape, lr=1e-5, scheduler="constant"), data)
    names = ("tokens_per_second", "peak_memory_gib", "pipeline_bubble", "mfu")
    result = {name: throughput.last[name] for name in names if name in throughput.last}
    describe = getattr(trainer.strategy, "describe_pipeline", lambda _: None)(micro_batches)
    if describe is not None:
        result |= {"predicted_bubble": describe["bubble"], "layers": describe["layers"]}
    return result


def launch(case: str, arguments: argparse.Namespace, root: str) -> dict[str, Any]:
    _, ranks = CASES[case]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    command += ["--case", case, "--root", root, "--precision", arguments.precision]
    command += ["--micro-batches", str(arguments.micro_batches), *(["--tiny"] if arguments.tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=arguments.timeout)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        return {"failed": done.stdout[-300:] + done.stderr[-2000:]}
    return json.loads(lines[0].removeprefix("RESULT "))


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The results as Markdown; `of the goal`: tokens per second by (1 − predicted bubble) × those of one stage."""
    lines = [
        "| case | tokens/s | peak GiB | bubble: measured | predicted | of the goal |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    alone = results.get("one stage", {}).get("tokens_per_second")
    for case, r in results.items():
        if "failed" in r:
            lines.append(f"| {case} | failed | | | | |")
            continue
        predicted, measured = r.get("predicted_bubble"), r.get("pipeline_bubble")
        goal = alone and predicted is not None and r["tokens_per_second"] / ((1 - predicted) * alone)
        shares = [f"{share:.1%}" if share is not None else "" for share in (measured, predicted, goal or None)]
        lines.append(f"| {case} | {r['tokens_per_second']:,.0f} | {r['peak_memory_gib']:.1f} | {' | '.join(shares)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model on CPU ranks")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precision", default="bf16-true", help="bf16 keeps fp32 master weights (twice the memory)")
    parser.add_argument("--micro-batches", type=int, default=8, help="of two rows, per step of a pipeline")
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        result = run(arguments.case, arguments.tiny, arguments.precision, arguments.micro_batches, arguments.root)
        if int(os.environ.get("RANK", 0)) == 0:
            print("RESULT " + json.dumps(result), flush=True)
        return
    results = {}
    with tempfile.TemporaryDirectory() as root:
        for case in arguments.cases:
            results[case] = launch(case, arguments, root)
            print(json.dumps({"case": case, **results[case]}), flush=True)
    print("\n".join(["", f"torch {torch.__version__}", *table(results)]))


if __name__ == "__main__":
    main()
