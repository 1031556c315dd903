"""The memory of the configurations in `configs/models/`, measured on one GPU, beside the estimate in their first lines.

`python benchmarks/config_memory.py` runs what fits on one GPU of 24, 48, 80 and 141 GiB, and one rank of what fits on
eight, each case in a process of its own that may take no more than that GPU has. The other seven ranks are imagined
(`imagined.py`): shards and gathered weights have their real sizes. Weights are random, and the peak is that of the
steps. Experts on several ranks (`ep`) need real GPUs and are left out, and so are towers for pictures. Cases run side
by side while the GPU has room for them. `--tiny` only shows that the script runs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cases import report, result_of

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "site"))

SHAPES = {
    "meta-llama/Llama-3.1-8B": "8B",
    "Qwen/Qwen3-8B": "Qwen3-8B",
    "google/gemma-3-4b-it": "gemma-3-4b",
    "openai/gpt-oss-20b": "gpt-oss-20b",
    "Qwen/Qwen3-30B-A3B": "30B-A3B",
}
LENGTH = 2048
STEPS = 2
ROOM = 136  # GiB that the cases of one time share


def cases() -> dict[str, dict[str, Any]]:
    """What the files say fits: `model|goal|gpus|memory` to its layout, rows and estimate."""
    from choose import GPUS, MEMORY, TOWERS, plan

    found: dict[str, dict[str, Any]] = {}
    for model in SHAPES:
        for gpus in (n for n in GPUS if n in (1, 8)):
            for memory in MEMORY:
                plans = ((goal, plan(model, goal, gpus, memory, LENGTH)) for goal in ("full", "lora", "qlora"))
                goal, fits = next(((goal, fits) for goal, fits in plans if fits), ("", None))
                if fits is None or "ep=" in fits[0]:
                    continue
                strategy, rows, gib = fits
                said = round(gib - 2 * TOWERS.get(model, 0) / gpus / 2**30, 1)
                case = {"strategy": strategy, "rows": rows, "estimate_gib": said}
                if case not in found.values():
                    found[f"{model}|{goal}|{gpus}|{memory}"] = case
    return found


def run(name: str, tiny: bool) -> dict[str, Any]:
    """Train for a few steps; returns GiB of the steps' peak, and of what the allocator held."""
    from imagined import imagine
    from lightning.pytorch.callbacks import Callback
    from random_model import RandomModel
    from shapes import SHAPES as SIZES
    from transformers import AutoConfig

    from automodel_trainer import LoRAConfig, MockDataModule, Trainer

    model, goal, gpus, memory = name.split("|")
    case, ranks = cases()[name], int(gpus)
    sizes = SIZES[SHAPES[model]] | {"max_position_embeddings": LENGTH}
    if tiny:
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32}
        sizes = {**sizes, **{key: value for key, value in small.items() if key in sizes or "moe" not in key}}
    gpu = torch.cuda.is_available()

    def limit() -> None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, int(memory) * 2**30 / total))

    if gpu and goal != "qlora":
        limit()
    if ranks > 1:
        imagine(ranks)

    class Peak(Callback):
        """Counts the memory of steps, not that of building the model."""

        def on_train_start(self, *_: Any) -> None:
            if gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                limit()  # random weights lie whole in bf16 before they are quantized; a checkpoint's do not

    trainer = Trainer(
        strategy=case["strategy"],
        devices=1,
        num_nodes=ranks,
        precision="bf16" if gpu else "fp32",
        max_steps=STEPS,
        log_every_n_steps=STEPS,
        default_root_dir=tempfile.mkdtemp(),
        callbacks=[Peak()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    rows = 1 if tiny else case["rows"]
    batch = 2 * rows * ranks
    data = MockDataModule(
        vocab_size=sizes.get("vocab_size", 200000),
        seq_len=64 if tiny else LENGTH,
        micro_batch_size=rows,
        global_batch_size=batch,
        num_samples=batch * STEPS,
    )
    lora = LoRAConfig(rank=16, quantize="nf4" if goal == "qlora" else None) if goal != "full" else None
    trainer.fit(RandomModel(AutoConfig.for_model(**sizes), lora=lora, lr=1e-5), data)
    peak, held = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if gpu else (0, 0)
    return {"peak_gib": round(peak / 2**30, 1), "held_gib": round(held / 2**30, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a pattern (re) of `model|goal|gpus|memory`")
    parser.add_argument("--timeout", type=int, default=120, help="seconds of a case")
    parser.add_argument("--at-once", type=int, default=6, help="the most cases at one time")
    parser.add_argument("--list", action="store_true", help="print the cases and their estimates")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        report(run(args.case, args.tiny))
        return
    print("| model | what | GPUs of | rows | estimate, GiB | measured | held by the allocator |\n" + "| --- " * 7 + "|")
    chosen = {name: case for name, case in cases().items() if re.search(args.only, name)}
    room = Room(ROOM)
    with ThreadPoolExecutor(args.at_once) as pool:
        cells = ["" if args.list else pool.submit(room.run, case, name, args) for name, case in chosen.items()]
        for (name, case), cell in zip(chosen.items(), cells):
            model, goal, gpus, memory = name.split("|")
            again = ", recomputed" if "activation" in case["strategy"] else ""
            said = f"| {model} | {goal}{again} | {gpus} × {memory} GiB | {case['rows']} | {case['estimate_gib']} |"
            print(said + (cell if args.list else f" {cell.result()}"), flush=True)


class Room:
    """Memory that cases take by their estimates and give back."""

    def __init__(self, gib: float) -> None:
        self.left, self.whole = gib, gib
        self.changed = threading.Condition()

    def needed(self, case: dict[str, Any], name: str) -> float:
        """GiB of a case at most; random weights lie whole in bf16 before they are quantized."""
        from choose import MODELS

        model, goal, _, memory = name.split("|")
        most = min(case["estimate_gib"] * 1.1 + 2, int(memory))
        return min(max(most, 2 * MODELS[model].parameters / 2**30 + 5 if goal == "qlora" else 0), self.whole)

    def run(self, case: dict[str, Any], name: str, args: argparse.Namespace) -> str:
        """Measure the case as soon as there is room."""
        needed = self.needed(case, name)
        with self.changed:
            self.changed.wait_for(lambda: self.left >= needed)
            self.left -= needed
        try:
            return measured(name, args)
        finally:
            with self.changed:
                self.left += needed
                self.changed.notify_all()


def measured(name: str, args: argparse.Namespace) -> str:
    """The last cells of a line."""
    result = result_of(__file__, ["--case", name, *(["--tiny"] if args.tiny else [])], args.timeout, lines=0)
    if isinstance(result, str):
        return f"{result} | |"
    return f"{result['peak_gib']} | {result['held_gib']} |"


if __name__ == "__main__":
    main()
