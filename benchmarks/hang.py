"""Check that the watchdog works while NCCL hangs. Run `python benchmarks/hang.py` on two or more GPUs.

In step 3, one rank skips the collectives (`hangs`), raises (`raises`) or is killed (`killed`), and the others wait for
it in NCCL. In each case the processes must end by themselves within 30 s, with a nonzero exit code. `hangs` must print
a table of all ranks and write a file of stacks for each. (NCCL's calls return at once, so the table names the line that
waits for a result, not the collective.) `raises` must print the RuntimeError of rank 1. All cases run at the same time,
in about 40 s on two GPUs. A case that has not ended after `--limit` seconds is killed and reported as hung. `--device
cpu` tests the script itself.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from transformers import AutoConfig, AutoModelForCausalLM

KINDS, LAUNCHERS = ("hangs", "raises", "killed"), ("devices", "torchrun")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}


class Accident(Callback):
    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step + 1 != 3:
            return
        if trainer.global_rank != 1:
            print(f"rank {trainer.global_rank} goes into step 3", flush=True)
            return
        (self.folder / "accident").write_text(str(time.time()))
        if self.kind == "hangs":
            time.sleep(600)
        elif self.kind == "raises":
            raise RuntimeError("on purpose, on one rank only")
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def train(kind: str, root: str, device: str) -> None:
    from automodel_trainer import CausalLMModule, MockDataModule, Trainer
    from automodel_trainer.callbacks import Watchdog

    config = AutoConfig.for_model("llama", num_key_value_heads=4, vocab_size=1024, **SIZES)
    ranks = ranks_on(device)
    data = MockDataModule(vocab_size=1024, seq_len=64, global_batch_size=ranks, num_samples=64)
    trainer = Trainer(
        strategy="fsdp2", accelerator=device, devices=ranks, max_steps=6, default_root_dir=root, logger=False,
        precision="bf16" if device == "cuda" else "fp32", log_every_n_steps=1,
        callbacks=[Watchdog(silence=8), Accident(kind, Path(root))],
    )  # fmt: skip
    trainer.fit(CausalLMModule(AutoModelForCausalLM.from_config(config), lr=1e-3), data)


def ranks_on(device: str) -> int:
    return torch.cuda.device_count() if device == "cuda" else 2


class Case:
    """A running case: one accident under one launcher."""

    def __init__(self, kind: str, launcher: str, device: str, base: Path) -> None:
        self.name, self.folder = f"{kind}, {launcher}", base / f"{kind}-{launcher}"
        self.folder.mkdir()
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks_on(device))]
        command = [sys.executable, *(torchrun if launcher == "torchrun" else []), __file__]
        with (self.folder / "log").open("w") as log:
            command += ["--device", device, "--case", kind, "--root", str(self.folder)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def report(self) -> None:
        accident = self.folder / "accident"
        since = (
            f"{time.time() - float(accident.read_text()):.0f} s after the accident" if accident.exists() else "early"
        )
        stacks = len(list(self.folder.glob("stacks/*/rank-*.txt")))
        print(f"--- {self.name}: code {self.process.returncode}, {since}, {stacks} files of stacks")
        log = (self.folder / "log").read_text()
        at = max(log.find("The job ends"), log.find("RuntimeError: on purpose") - 200)
        print(log[at : at + 1500] if at >= 0 else log[-1500:], flush=True)

    def kill(self) -> None:
        print(f"--- {self.name}: STILL THERE, killed\n{(self.folder / 'log').read_text()[-1500:]}", flush=True)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=float, default=75)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=LAUNCHERS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        train(args.case, args.root, args.device)
        return
    end = time.monotonic() + args.limit
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:
        cases = [Case(k, launcher, args.device, Path(base)) for launcher in args.launchers for k in args.kinds]
        while cases and time.monotonic() < end:
            for case in [case for case in cases if case.process.poll() is not None]:
                case.report()
                cases.remove(case)
            time.sleep(0.2)
        for case in cases:
            case.kill()


if __name__ == "__main__":
    main()
