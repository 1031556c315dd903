"""From `amt fit` to the end of step 1: LoRA r=16 on a llama-8B-shaped checkpoint on one GPU, 2 rows of 4,096 tokens.

`python benchmarks/first_step.py` writes random weights (16 GB), reads them once so that the file system is warm, and
runs `amt fit` `--runs` times, each in a process of its own. The first has empty caches of compiled code. It prints when
each part ended, in seconds since the process began, and how many modules were imported by then. Packages without
bytecode are compiled first, as an ordinary installation does. `--profile` prints where the time of two more runs went,
with empty and with filled caches, as a tree of calls (`sampled.py`). `--tiny` is for a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback


def since_start() -> float:
    """Seconds since this process began, imports of the interpreter included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


IMPORTED = since_start()  # the parser imports this file as soon as it reads the configuration


class Clock(Callback):
    """Prints when the parts of a run's start ended, and how many modules were imported by then."""

    def __init__(self) -> None:
        self.times = {"imports": IMPORTED}
        self.modules: dict[str, int] = {}
        self.note("parsing")

    def note(self, part: str) -> None:
        """Note that a part has ended, the first time."""
        if part not in self.times:
            self.times[part], self.modules[part] = since_start(), len(sys.modules)

    def noting(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose end is noted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.note(part)
            return result

        return call

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.note("before setup")
        strategy = trainer.strategy
        strategy.parallelize = self.noting("laid out", strategy.parallelize)
        pl_module.configure_model = self.noting("weights read", pl_module.configure_model)
        pl_module.loss = self.noting("forward 1", pl_module.loss)

    def on_fit_start(self, *_: Any) -> None:
        self.note("model ready")

    def on_train_batch_start(self, *_: Any) -> None:
        self.note("step 1 starts")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.wait_for("backward 1")

    def on_train_batch_end(self, *_: Any) -> None:
        self.wait_for("step 2" if "step 1" in self.times else "step 1")

    def wait_for(self, part: str) -> None:
        """Note that a part has ended on the device."""
        import torch

        if part not in self.times:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.note(part)

    def on_train_end(self, *_: Any) -> None:
        print("RESULT " + json.dumps({name: round(value, 1) for name, value in self.times.items()}))
        print("MODULES " + json.dumps(self.modules), flush=True)


def write_checkpoint(folder: Path, tiny: bool) -> int:
    """A checkpoint of random weights in shards of 4 GB; returns the bytes of its weights."""
    import torch
    from bytes_per_block import EIGHT_B, TINY
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = (TINY if tiny else EIGHT_B) | {"num_hidden_layers": 2 if tiny else 32, "max_position_embeddings": 8192}
    shape = LlamaConfig(**sizes, dtype="bfloat16")
    with torch.device("cpu" if tiny else "cuda"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    files = [*folder.glob("*.safetensors")]
    for file in files:
        with file.open("rb") as opened:
            while opened.read(1 << 26):
                pass
    return sum(file.stat().st_size for file in files)


CONFIG = """
trainer:
  strategy: {strategy}
  precision: bf16
  max_steps: 2
  logger: false
  enable_checkpointing: false
  default_root_dir: {folder}/run
  callbacks:
    - class_path: first_step.Clock
model:
  model: {model}
  lr: 1.0e-4
  lora: {{rank: 16, alpha: 32}}
data:
  class_path: MockDataModule
  init_args: {{vocab_size: 512, seq_len: {length}, micro_batch_size: 2, global_batch_size: 2, num_samples: 4}}
"""


def compile_sources() -> None:
    """Write the bytecode of torch's neighbours if the machine's image came without."""
    from automodel_trainer.imports import compiles_again

    if folder := compiles_again("torch"):
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        subprocess.run([sys.executable, "-m", "compileall", "-q", "-j", "0", str(folder)], env=env, capture_output=True)
        print(f"wrote bytecode in {folder}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--strategy", default="fsdp2")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--model", help="a checkpoint that an earlier call has written; by default a new one")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    compile_sources()
    folder = Path(tempfile.mkdtemp())
    model = Path(args.model or folder / "model")
    if not model.exists():
        start = time.perf_counter()
        size = write_checkpoint(model, args.tiny)
        print(f"wrote {size / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s", flush=True)
    length = 64 if args.tiny else 4096
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder, model=model, length=length, strategy=args.strategy))
    for run in range(args.runs):
        print(f"run {run + 1}:", *times_of_a_run(folder), sep="\n", flush=True)
    for caches in ["empty", "caches"] if args.profile else []:
        print(f"profiled, {caches}:", *times_of_a_run(folder, caches, tree=folder / "tree"), sep="\n")
        print((folder / "tree").read_text(), flush=True)


def times_of_a_run(folder: Path, caches: str = "caches", tree: Path | None = None) -> list[str]:
    """What a run prints of its start, in a process of its own. `caches` is its folder for compiled code."""
    here = Path(__file__).parent
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")]),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / caches / "inductor"),
        "TRITON_CACHE_DIR": str(folder / caches / "triton"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    command = [sys.executable, *([str(here / "sampled.py"), str(tree)] if tree else [])]
    command += ["-m", "automodel_trainer", "fit", "--config", str(folder / "run.yaml")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(("RESULT ", "MODULES "))]
    return found or [f"failed: {done.stderr[-1500:]}"]


if __name__ == "__main__":
    main()
