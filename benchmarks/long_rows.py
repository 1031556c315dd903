"""Long rows and small GPUs: LoRA r=16 on llama-8B's shape on one GPU, tokens/s, peak and host memory.

`python benchmarks/long_rows.py` runs every case in its own process. A case is a line of words: the tokens of a row, how
blocks are checkpointed (`full`, `selective`, `offload`, `full:20`; else not), `tiled` (or `tiled=N`), `rows=N` of a
micro-batch, `documents=N` (a row is packed from documents of N tokens), `nf4` (a 4-bit base), `whole` (all parameters
instead of LoRA), `cap=N` (GiB that the process may take of the GPU), `memory=80%` or `memory=20` (a budget, which
chooses how blocks are checkpointed), `host=N` (GiB of host memory for inputs), `eager`, `cp=N` (a row on N GPUs).
Figures are of the steps after the first. `--tiny` only shows that the script runs. `--case` runs one case in this
process and says when each step ends.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from typing import Any

import torch
from bytes_per_block import EIGHT_B, TINY
from cases import report, result_of

CASES = [
    "65536 full",
    "65536 full tiled",
    "65536 offload tiled",
    "131072 full tiled",
    "131072 offload",
    "131072 offload tiled",
    "262144 offload tiled",
    "524288 offload tiled",
    "786432 nf4 offload tiled",
    "4096 rows=2 nf4 full cap=24",
    "4096 rows=2 nf4 full tiled=4 cap=24",
    "4096 rows=2 nf4 offload tiled=4 cap=24",
    "4096 rows=2 full cap=24",
    "4096 rows=2 offload tiled=4 cap=24",
    "4096 rows=2 selective cap=48",
    "65536 memory=80%",
    "131072 memory=80%",
    "262144 memory=80%",
    "4096 rows=2 memory=22",
    "4096 rows=2 memory=80%",
]
MODES = ("full", "selective", "offload")


def value(words: list[str], name: str, default: int) -> int:
    """N of a word `name=N`."""
    return next((int(word.partition("=")[2]) for word in words if word.startswith(f"{name}=")), default)


def strategy_of(words: list[str]) -> str:
    """The strategy of a case, as a string."""
    parts = [f"activation_checkpointing={word}" for word in words if word.partition(":")[0] in MODES]
    parts += ["tiled_mlp=auto"] if "tiled" in words else []
    parts += [f"tiled_mlp={count}"] if (count := value(words, "tiled", 0)) else []
    parts += [word for word in words if word.startswith("memory=")]
    parts += ["compile=false"] if "eager" in words else []
    parts += [word for word in words if word.startswith("cp=")]
    return "fsdp2" + (":" + ",".join(parts) if parts else "")


def packed_rows(length: int) -> type[Any]:
    """Rows of random tokens that are packed from documents of so many."""
    from automodel_trainer.data.rows import Document, RandomRows

    class PackedRows(RandomRows):
        def fetch(self, rows: Any) -> list[list[Document]]:
            return [[part for document in row for part in self.parts(document)] for row in super().fetch(rows)]

        def parts(self, document: Document) -> list[Document]:
            ids, trained = document.input_ids, document.trained
            starts = range(0, len(ids), length)
            return [Document(ids[i : i + length], trained[i : i + length], document.sample_id) for i in starts]

    return PackedRows


def run(case: str, layers: int, steps: int, tiny: bool) -> dict[str, Any]:
    from lightning.pytorch.callbacks import Callback
    from random_model import RandomModel
    from transformers import LlamaConfig

    from automodel_trainer import LoRAConfig, MockDataModule, Trainer
    from automodel_trainer.nn import offload

    words = case.split()
    seq_len, rows, cap = int(words[0]), value(words, "rows", 1), value(words, "cap", 0)
    sizes = TINY if tiny else EIGHT_B
    shape = LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=seq_len)
    gpu = torch.cuda.is_available()
    if host := value(words, "host", 0):
        offload.usable_host_memory = lambda ranks: host * 2**30 // ranks
    if cap and gpu:
        torch.cuda.set_per_process_memory_fraction(cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)

    class Clock(Callback):
        """Times steps, and counts the memory of those after the first."""

        ends: list[float] = []
        first_peak = host = 0

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            inputs = trainer.strategy.prepared.host
            self.host = inputs.held if inputs else 0
            peak = torch.cuda.max_memory_allocated() if gpu else 0
            seconds = self.ends[-1] - start
            print(f"step {len(self.ends)} ended after {seconds:.0f} s, peak {peak / 2**30:.1f} GiB", file=sys.stderr)
            if len(self.ends) == 1 and gpu:
                self.first_peak = peak
                torch.cuda.reset_peak_memory_stats()

    clock = Clock()
    trainer = Trainer(
        strategy=strategy_of(words),
        devices="auto" if value(words, "cp", 1) > 1 else 1,
        precision="bf16" if gpu else "fp32",
        max_steps=steps,
        log_every_n_steps=steps,
        default_root_dir=tempfile.mkdtemp(),
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    data = MockDataModule(
        vocab_size=sizes["vocab_size"],
        seq_len=seq_len,
        micro_batch_size=rows,
        global_batch_size=rows,
        num_samples=rows * steps,
    )
    if documents := value(words, "documents", 0):
        rows_of = packed_rows(documents)
        data.build_rows = lambda: {"train": rows_of(rows * steps, seq_len, sizes["vocab_size"], 0)}  # type: ignore[method-assign]
    lora = None if "whole" in words else LoRAConfig(rank=16, alpha=32, quantize="nf4" if "nf4" in words else None)
    start = time.perf_counter()
    trainer.fit(RandomModel(shape, lora=lora, lr=1e-4), data)
    per_step = (clock.ends[-1] - clock.ends[0]) / (steps - 1)
    peak, reserved = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if gpu else (0, 0)
    chosen = trainer.strategy.chosen
    return {
        **({"chosen": str(chosen)} if chosen else {}),
        "tok_s": round(rows * seq_len / per_step),
        "step_s": round(per_step, 2),
        "first_step_s": round(clock.ends[0] - start, 1),
        "peak_gib": round(peak / 2**30, 2),
        "first_peak_gib": round(clock.first_peak / 2**30, 2),
        "reserved_gib": round(reserved / 2**30, 2),
        "host_gib": round(clock.host / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case")
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=300)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.case is not None:
        report(run(args.case, args.layers, args.steps, args.tiny))
        return
    passed = ["--layers", str(args.layers), "--steps", str(args.steps), *(["--tiny"] if args.tiny else [])]
    for case in args.cases:
        ranks = value(case.split(), "cp", 0)
        print(f"{case}: {result_of(__file__, ['--case', case, *passed], args.timeout, ranks)}", flush=True)


if __name__ == "__main__":
    main()
