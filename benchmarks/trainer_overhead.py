"""Measure the overhead of the Trainer: the same model in a bare loop and in a Trainer, interleaved in one run.

    python benchmarks/trainer_overhead.py                      # a test-sized model, against Lightning's own Trainer too
    python benchmarks/trainer_overhead.py --shape 8b --lora    # on a GPU

After every `--span` optimizer steps of the Trainer, a callback runs as many steps of a bare loop over the same model,
optimizer and batch (ABAB…). So clocks, compiled code and memory are the same for both. The script prints the medians
over the rounds and half the distance between the first and the last decile. Ratios are computed per round.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM as Plain
from transformers import LlamaConfig

from automodel_trainer import AutoModelForCausalLM, CausalLMModule, LoRAConfig, Trainer
from automodel_trainer.modules.loss import next_token_targets, supervised_tokens, token_losses
from automodel_trainer.modules.optim import SchedulerConfig, build_optimizer, build_scheduler

SHAPES: dict[str, dict[str, Any]] = {
    "test": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY = {"test": 512, "1b": 128256, "8b": 128256}
LENGTH = {"test": 64, "1b": 4096, "8b": 4096}
CLIP = 1.0
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False}


def config_of(shape: str) -> LlamaConfig:
    heads = {"num_key_value_heads": 2 if shape == "test" else 8}
    return LlamaConfig(**SHAPES[shape], **heads, vocab_size=VOCABULARY[shape], max_position_embeddings=LENGTH[shape])


def batch_of(shape: str, rows: int) -> dict[str, Any]:
    ids = torch.randint(1, VOCABULARY[shape], (rows, LENGTH[shape]), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


# --- the two ways to train ------------------------------------------------------------------------------------------


class RandomModel(CausalLMModule):
    """Our model and module, with random weights."""

    def __init__(self, shape: str, **kwargs: Any) -> None:
        with torch.device("meta"):
            super().__init__(Plain.from_config(config_of(shape)), **kwargs)
        self.shape = shape

    def _build(self) -> Any:
        return AutoModelForCausalLM.from_config(config_of(self.shape), self.strategy, seed=1, lora=self.lora)

    def bare_step(self, micro_batch: dict[str, Any], optimizer: Any, scheduler: Any) -> None:
        inputs, targets = self.split(micro_batch)
        loss = self.loss(self.strategy.forward(self.model, inputs), targets)
        step(loss / supervised_tokens(micro_batch["labels"]), self.model, optimizer, scheduler)


class LightningModel(pl.LightningModule):
    """The same module as a user would write it for Lightning's own Trainer."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_config(config_of(shape), seed=1).train()

    def loss(self, micro_batch: dict[str, Any]) -> Tensor:
        logits = self.model(input_ids=micro_batch["input_ids"], use_cache=False).logits
        losses = token_losses(logits, next_token_targets(micro_batch["labels"]))
        return losses.sum() / supervised_tokens(micro_batch["labels"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer("AdamW", self.model, 1e-5)
        scheduler = build_scheduler(SchedulerConfig("constant"), optimizer, None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def bare_step(self, micro_batch: dict[str, Any], optimizer: Any, scheduler: Any) -> None:
        step(self.loss(micro_batch), self.model, optimizer, scheduler)


def step(loss: Tensor, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """The minimum that a training loop must do with a loss."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


# --- the clock ------------------------------------------------------------------------------------------------------


@dataclass
class Interleave(Callback):
    """Times `span` steps of the Trainer, then runs and times `span` steps of the bare loop, `rounds` times."""

    micro_batch: dict[str, Any]
    span: int
    rounds: int
    warmup: int
    trainer: list[float] = field(default_factory=list)  # seconds per step in every round
    bare: list[float] = field(default_factory=list)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        device = pl_module.device if trainer.world_size == 1 else trainer.strategy.root_device
        self.micro_batch = {key: value.to(device) for key, value in self.micro_batch.items()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        count = trainer.global_step - self.warmup
        if count < 0 or count % self.span:
            return
        if count:
            self.trainer.append((now() - self._since) / self.span)
        begin = now()
        for _ in range(self.span if count else self.warmup):
            pl_module.bare_step(self.micro_batch, trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler)
        if count:
            self.bare.append((now() - begin) / self.span)
        self._since = now()

    @property
    def steps(self) -> int:
        return self.warmup + self.span * self.rounds


def now() -> float:
    """A clock in seconds. Without a GPU, the CPU time of this process, which other processes do not affect."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[int(0.9 * (len(ordered) - 1))] - ordered[int(0.1 * (len(ordered) - 1))]) / 2


# --- runs -----------------------------------------------------------------------------------------------------------


def ours(options: argparse.Namespace, clock: Interleave, folder: str) -> None:
    module = RandomModel(
        options.shape, lora=LoRAConfig(rank=16) if options.lora else None, lr=1e-5, scheduler="constant"
    )
    quiet: dict[str, Any] = {} if options.defaults else {**QUIET, "enable_ledger": False}
    trainer = Trainer(
        max_steps=clock.steps, strategy=options.strategy, precision=options.precision, devices=1,
        accelerator=options.accelerator, enable_checkpointing=False, default_root_dir=folder, callbacks=[clock],
        **quiet,
    )  # fmt: skip
    trainer.fit(module, [[batch_of(options.shape, options.rows)]] * clock.steps)


def lightning(options: argparse.Namespace, clock: Interleave, folder: str) -> None:
    quiet: dict[str, Any] = {} if options.defaults else QUIET
    trainer = pl.Trainer(
        max_steps=clock.steps, devices=1, accelerator=options.accelerator, gradient_clip_val=CLIP, precision="32-true",
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder, callbacks=[clock],
        log_every_n_steps=10, **quiet,
    )  # fmt: skip
    rows = [batch_of(options.shape, options.rows)] * clock.steps
    trainer.fit(LightningModel(options.shape), DataLoader(rows, batch_size=None))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="test")
    parser.add_argument("--lora", action="store_true", help="rank 16 on all linear layers")
    parser.add_argument("--rows", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--precision", help="default: fp32 for the test shape, bf16 otherwise")
    parser.add_argument("--accelerator", help="default: cpu for the test shape, auto otherwise")
    parser.add_argument("--span", type=int, help="steps between switches")
    parser.add_argument("--rounds", type=int, default=10, help="switches of a run")
    parser.add_argument("--runs", type=int, default=2, help="runs of each Trainer, taking turns")
    parser.add_argument("--defaults", action="store_true", help="loggers and progress bars as both Trainers have them")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    options = parser.parse_args()
    small = options.shape == "test"
    options.span = options.span or (20 if small else 5)
    options.precision = options.precision or ("fp32" if small else "bf16")
    options.accelerator = options.accelerator or ("cpu" if small else "auto")
    kinds = {"ours": ours, "lightning": lightning} if small and not options.lora else {"ours": ours}
    if small:
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clocks: dict[str, list[Interleave]] = {kind: [] for kind in kinds}
    for _ in range(options.runs):
        for kind, run in kinds.items():
            clock = Interleave(batch_of(options.shape, options.rows), options.span, options.rounds, options.span)
            with tempfile.TemporaryDirectory() as folder:
                run(options, clock, folder)
            clocks[kind].append(clock)
            if not options.json:
                rounds = ", ".join(f"{1e3 * a:.1f}/{1e3 * b:.1f}" for a, b in zip(clock.trainer, clock.bare))
                print(f"{kind:10} ms a step in Trainer/bare loop, round by round: {rounds}", flush=True)
    report({kind: summary(runs) for kind, runs in clocks.items()}, options.json)


def summary(runs: list[Interleave]) -> dict[str, float]:
    through = [seconds for run in runs for seconds in run.trainer]
    bare = [seconds for run in runs for seconds in run.bare]
    ratios = [a / b for a, b in zip(through, bare)]
    return {
        "trainer_ms": 1e3 * statistics.median(through),
        "bare_ms": 1e3 * statistics.median(bare),
        "overhead_ms": 1e3 * statistics.median(a - b for a, b in zip(through, bare)),
        "overhead_ms_spread": 1e3 * spread([a - b for a, b in zip(through, bare)]),
        "ratio": statistics.median(ratios),
        "ratio_spread": spread(ratios),
    }


def report(found: dict[str, dict[str, float]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    for kind, values in found.items():
        print(
            f"{kind:10} trainer {values['trainer_ms']:.2f} ms, bare {values['bare_ms']:.2f} ms a step; overhead "
            f"{values['overhead_ms']:.2f} ± {values['overhead_ms_spread']:.2f} ms; "
            f"ratio {values['ratio']:.4f} ± {values['ratio_spread']:.4f}"
        )


if __name__ == "__main__":
    main()
