"""Does the watchdog speak while NCCL hangs? `python benchmarks/hang.py` on two GPUs or more; says what it found.

One rank misses the collectives of step 3 (`hangs`), raises there (`raises`) or is killed (`killed`), the others wait
for it in NCCL. Expected of each: the processes end by themselves, with a code that is not 0, within 60 s of step 3; for
`hangs` a table with a collective for every rank but 1, and a file of stacks for each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from transformers import AutoConfig, AutoModelForCausalLM

KINDS = ("hangs", "raises", "killed")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}


class Accident(Callback):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step + 1 != 3:
            return
        if trainer.global_rank != 1:
            print(f"rank {trainer.global_rank} goes into step 3", flush=True)
        elif self.kind == "hangs":
            time.sleep(600)
        elif self.kind == "raises":
            raise RuntimeError("on purpose, on one rank only")
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def train(kind: str, root: str) -> None:
    from automodel_trainer import CausalLMModule, MockDataModule, Trainer
    from automodel_trainer.callbacks import Watchdog

    config = AutoConfig.for_model("llama", num_key_value_heads=4, vocab_size=1024, **SIZES)
    data = MockDataModule(vocab_size=1024, seq_len=256, global_batch_size=torch.cuda.device_count(), num_samples=64)
    trainer = Trainer(
        strategy="fsdp2", devices="auto", precision="bf16", max_steps=6, default_root_dir=root, logger=False,
        log_every_n_steps=1, callbacks=[Watchdog(silence=15), Accident(kind)],
    )  # fmt: skip
    trainer.fit(CausalLMModule(AutoModelForCausalLM.from_config(config), lr=1e-3), data)


def launched(kind: str, launcher: list[str]) -> None:
    with tempfile.TemporaryDirectory() as root:
        started = time.monotonic()
        command = [*launcher, __file__, kind, root]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        stacks = len(list(Path(root).glob("stacks/*/rank-*.txt")))
        name = "torchrun" if len(launcher) > 1 else "devices=auto"
        print(f"--- {kind}, {name}: code {done.returncode} after {time.monotonic() - started:.0f} s, {stacks} stacks")
        at = done.stderr.find("The job ends")
        print(done.stderr[at : at + 3000] if at >= 0 else done.stderr[-2000:], flush=True)


def main() -> None:
    if len(sys.argv) == 3:
        train(*sys.argv[1:])
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "gpu"]
    for launcher in ([sys.executable], torchrun):
        for kind in KINDS:
            launched(kind, launcher)


if __name__ == "__main__":
    main()
