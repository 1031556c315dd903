"""One rank of `replica_kills.py`: trains until somebody ends it, and keeps a diary."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from transformers import AutoConfig

from automodel_trainer import MockDataModule, Trainer
from automodel_trainer.callbacks import DCPCheckpoint
from benchmarks.random_model import RandomModel

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "100m": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}


class Diary(Callback):
    """The time, the step and the rows of this rank, at the end of each step; the process; and what returns cost."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.returned: Any = None

    def on_fit_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.file.with_suffix(f".pid-{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        if trainer.global_rank == 0:
            rows = sum(len(micro_batch["sample_ids"]) for micro_batch in batch)
            with self.file.open("a") as stream:
                stream.write(json.dumps([time.time(), trainer.global_step, rows]) + "\n")
            returned = getattr(trainer.strategy, "returned", None)
            if returned is not self.returned:
                self.returned = returned
                with self.file.with_suffix(".returns").open("a") as stream:
                    stream.write(f"{returned}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, required=True, help="the diary")
    parser.add_argument("--strategy", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True, help="of a global batch")
    parser.add_argument("--every", type=int, help="steps between checkpoints; without it none is written")
    options = parser.parse_args()
    config = AutoConfig.for_model("llama", num_key_value_heads=4, vocab_size=32000, **SHAPES[options.shape])
    data = MockDataModule(
        32000, seq_len=options.seq_len, micro_batch_size=1, global_batch_size=options.rows, num_samples=100_000
    )
    saves = [] if options.every is None else [DCPCheckpoint(every_n_steps=options.every)]
    trainer = Trainer(
        accelerator=options.device,
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=options.strategy,
        precision="bf16" if options.device == "cuda" else "fp32",
        max_steps=1_000_000,
        max_epochs=-1,
        default_root_dir=options.file.parent,
        callbacks=[Diary(options.file), *saves],
        enable_checkpointing=bool(saves),
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(RandomModel(config), data, ckpt_path="auto" if saves else None)


if __name__ == "__main__":
    main()
