"""Our Trainer and Unsloth on one GPU, in one call: tokens/s, peak memory and their ratio, case by case.

    python benchmarks/beside_unsloth.py --folder /tmp/peers --peer-path /tmp/site_unsloth

Every case runs in two processes, ours and Unsloth's. Unsloth loads its model from a folder of random weights, which is
written once for each shape. `--peer-path` takes the place of PYTHONPATH there, because Unsloth needs other versions of
packages. A case is a line of words: the shape (of `shapes.py`, with `:N` for N layers), the tokens of a row, `rows=N`
of a micro-batch, `micro=N` micro-batches of a step, `nf4` (a 4-bit base), `whole` (all parameters, in bf16, instead of
LoRA r=16 on every linear layer), `cap=N` (GiB that the process may take of the GPU), `ours=…` (options of our
strategy), `theirs=…` (Unsloth's gradient checkpointing: `unsloth`, else none). Rates are the median of the steps after
the second; peaks are of the steps after the first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cases import report, result_of
from peer import SPECIAL, save_random, unsloth_model
from shapes import SHAPES

TINY = {
    "vocab_size": 128300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "moe_intermediate_size": 32, "num_experts": 8, "num_local_experts": 8,
}  # fmt: skip
FULL = "ours=activation_checkpointing=full theirs=unsloth"
LONG = "ours=activation_checkpointing=offload,tiled_mlp=auto theirs=unsloth"
CASES = [
    "8B 4096 rows=2 micro=4",
    "8B 4096 rows=2 micro=4 nf4",
    f"8B 4096 rows=2 micro=4 nf4 cap=24 {FULL}",
    f"8B 4096 rows=2 micro=4 cap=24 {FULL}",
    f"8B 131072 {LONG}",
    "1B 4096 rows=2 micro=4 whole",
    f"8B 4096 rows=2 micro=4 whole {FULL}",
    f"30B-A3B:12 4096 rows=2 {FULL}",
    f"30B-A3B:12 4096 rows=2 nf4 {FULL}",
    f"gpt-oss-20b:12 4096 rows=2 {FULL}",
]


class Case:
    """The words of a case."""

    def __init__(self, text: str) -> None:
        first, length, *self.words = text.split()
        self.shape, _, layers = first.partition(":")
        self.layers, self.length = int(layers or SHAPES[self.shape]["num_hidden_layers"]), int(length)
        self.rows, self.micro, self.cap = (
            int(self.value(name) or n) for name, n in (("rows", 1), ("micro", 1), ("cap", 0))
        )
        self.nf4, self.whole = "nf4" in self.words, "whole" in self.words

    def value(self, name: str) -> str:
        """V of a word `name=V`."""
        return next((word.partition("=")[2] for word in self.words if word.startswith(f"{name}=")), "")

    def config(self, tiny: bool) -> Any:
        from transformers import AutoConfig

        sizes = dict(SHAPES[self.shape])
        sizes |= {name: size for name, size in TINY.items() if tiny and name in sizes}
        sizes["num_hidden_layers"] = min(2, self.layers) if tiny else self.layers
        return AutoConfig.for_model(**sizes, **SPECIAL, max_position_embeddings=max(self.length, 8192))

    def folder(self, root: str) -> Path:
        return Path(root) / f"{self.shape}-{self.layers}"


class Clock:
    """Ends of steps, on the device, and the peak of those after the first."""

    def __init__(self) -> None:
        self.began, self.ends = time.perf_counter(), []

    def step(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if not self.ends:
                torch.cuda.reset_peak_memory_stats()
        self.ends.append(time.perf_counter())

    def figures(self, case: Case, loss: float) -> dict[str, Any]:
        steps = [after - before for before, after in pairwise(self.ends)]
        steady = sorted(steps[1:] or steps)
        return {
            "tok_s": round(case.rows * case.micro * case.length / statistics.median(steady), 1),
            "spread": round((steady[-1] - steady[0]) / statistics.median(steady), 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0,
            "first_step_s": round(self.ends[0] - self.began, 1),
            "loss": round(loss, 4),
        }


def ours(case: Case, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    from lightning.pytorch.callbacks import Callback
    from random_model import RandomModel

    from automodel_trainer import LoRAConfig, MockDataModule, Trainer

    clock = Clock()

    class Steps(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock.step()

    shape = case.config(args.tiny)
    precision = "bf16-true" if case.whole else "bf16"
    trainer = Trainer(
        strategy="fsdp2" + (f":{options}" if (options := case.value("ours")) else ""),
        devices=1,
        precision=precision if torch.cuda.is_available() else "fp32",
        max_steps=steps,
        log_every_n_steps=steps,
        default_root_dir=tempfile.mkdtemp(),
        callbacks=[Steps()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    batch = case.rows * case.micro
    data = MockDataModule(
        vocab_size=shape.vocab_size,
        seq_len=case.length,
        micro_batch_size=case.rows,
        global_batch_size=batch,
        num_samples=batch * steps,
    )
    lora = None if case.whole else LoRAConfig(rank=16, alpha=32, quantize="nf4" if case.nf4 else None)
    trainer.fit(RandomModel(shape, lora=lora, lr=1e-5 if case.whole else 1e-4), data)
    return clock.figures(case, float(trainer.callback_metrics["train_loss"]))


def theirs(case: Case, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    model = unsloth_model(
        case.folder(args.folder),
        case.length,
        checkpointing=case.value("theirs") or False,
        nf4=case.nf4,
        whole=case.whole,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print("trained parameters", sum(parameter.numel() for parameter in trained), trained[0].dtype, flush=True)
    optimizer = torch.optim.AdamW(trained, lr=1e-5 if case.whole else 1e-4, fused=True)
    vocabulary = model.config.vocab_size
    clock, total = Clock(), 0.0
    for _ in range(steps):
        total = 0.0
        for _ in range(case.micro):
            row = torch.randint(0, vocabulary, (case.rows, case.length), device="cuda")
            loss = model(input_ids=row, labels=row).loss
            (loss / case.micro).backward()
            total += float(loss.detach()) / case.micro
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step()
    return clock.figures(case, total)


def cap_memory(case: Case) -> None:
    if case.cap and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(case.cap * 2**30 / total)


def in_process(job: str, text: str, args: argparse.Namespace) -> dict[str, Any] | str:
    """The figures of one side of a case, or why there are none."""
    environment = {"PYTHONPATH": args.peer_path} if job != "ours" and args.peer_path else {}
    given = ["--job", job, "--cases", text, "--folder", args.folder, "--steps", str(args.steps)]
    given += ["--tiny"] * args.tiny
    return result_of(__file__, given, args.timeout, environment=environment, lines=args.lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--jobs", nargs="*", default=["save", "ours", "theirs"], help="of each case, in this order")
    parser.add_argument("--job", help="run this one, in this process")
    parser.add_argument("--folder", default="/tmp/peers")
    parser.add_argument("--peer-path", default="")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--timeout", type=int, default=300)
    parser.add_argument("--lines", type=int, default=3, help="of an error")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.job:
        case = Case(args.cases[0])
        steps = min(args.steps, 2) if case.length > 32768 else args.steps
        cap_memory(case)
        if args.job == "save":
            save_random(case.folder(args.folder), case.config(args.tiny))
            report({})
        else:
            run = ours if args.job == "ours" else theirs
            report(run(case, steps, args))
        return
    for text in args.cases:
        case, found = Case(text), {}
        for job in args.jobs:
            if job == "save" and (case.folder(args.folder) / "config.json").exists():
                continue
            began = time.perf_counter()
            found[job] = in_process(job, text, args)
            if job != "save" or found[job]:
                print(f"{text} | {job} ({time.perf_counter() - began:.0f} s): {found[job]}", flush=True)
        both = [found.get(job) for job in ("ours", "theirs")]
        if all(isinstance(one, dict) for one in both):
            print(f"{text} | ratio {both[0]['tok_s'] / both[1]['tok_s']:.3f}", flush=True)  # type: ignore[index]


if __name__ == "__main__":
    main()
