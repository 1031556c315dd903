"""Train under one layout, go on under another: what the table of docs/resume.md and its covering test are made with."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any
from zlib import crc32

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from automodel_trainer import CausalLMModule, ChatDataModule, LoRAConfig, OptimizerConfig, TextDataModule, Trainer
from automodel_trainer.callbacks import DCPCheckpoint
from automodel_trainer.data.base import MicroBatchDataModule
from tests.harness import Stop
from tests.pool import RankPool
from tests.routers import routed_model
from tests.tiny import tiny_model, tiny_tokenizer

LAYOUTS = {
    "single": ("auto", 1),
    "ddp ×2": ("ddp", 2),
    "fsdp2 ×2": ("fsdp2", 2),
    "fsdp2 ×4": ("fsdp2", 4),
    "hsdp 2×2": ("hsdp", 4),
    "tp ×2": ("fsdp2:tp=2", 2),
    "fsdp2 ×2, tp ×2": ("fsdp2:dp_shard=2,tp=2", 4),
    "cp ×2": ("fsdp2:cp=2", 2),
    "pp ×2": ("3d:pp=2", 2),
    "pp ×2, tp ×2": ("3d:pp=2,tp=2", 4),
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# For a mixture of experts; the others' names mean the same for it.
EXPERT_LAYOUTS = {
    "ep ×2": ("fsdp2:ep=2", 2),
    "fsdp2 ×2, ep ×2": ("fsdp2:ep=2", 4),
    "hsdp 2×2, ep ×2": ("hsdp:ep=2", 4),
    "tp ×2, ep ×4": ("fsdp2:tp=2,ep=4", 4),
    "pp ×2, ep ×2": ("3d:pp=2,ep=2", 4),
}
SAVED, STEPS, GLOBAL_BATCH = 3, 7, 4  # an epoch has 5 steps: saved in its middle, trained beyond its end
TOLERANCE = 1e-4  # relative, of every step's loss, where the layout is another


class Diary(Callback):
    """Of every step: its number, loss and learning rate, and this rank's rows: their sample ids and their tokens."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float, float]] = []
        self.rows: list[list[tuple[tuple[int, ...], int]]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        rows = [(tuple(part["sample_ids"]), crc32(part["input_ids"].numpy().tobytes())) for part in batch]
        self.rows.append(rows)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.steps.append((trainer.global_step, float(trainer.callback_metrics["train_loss"]), rate))


def data_of(kind: str) -> MicroBatchDataModule:
    """`packed`: chats, several to a row; `workers`: the same, built ahead in processes; `stream`: text, streamed."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 40, (64,), generator=draw).tolist()
    shared: dict[str, Any] = {"micro_batch_size": 1, "global_batch_size": GLOBAL_BATCH, "seed": 3, "cache": False}
    if kind == "stream":
        texts = [{"text": f"{i}: " + "abcdefgh " * (length // 8 + 1)} for i, length in enumerate(lengths)]
        return TextDataModule(texts, streaming=True, shuffle_buffer=8, num_workers=1, seq_len=64, **shared)
    chats = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "x" * length}]
        for i, length in enumerate(lengths)
    ]
    workers = 2 if kind == "workers" else 0
    return ChatDataModule([{"messages": chat} for chat in chats[:37]], seq_len=128, num_workers=workers, **shared)


def run(
    root: Path,
    layout: str,
    lora: bool,
    ckpt_path: str | None,
    kind: str = "packed",
    every: int = SAVED,
    last: int = STEPS,
    experts: bool = False,
) -> dict[str, Any]:
    """This rank's part of a run that saves every so many steps and trains on from `ckpt_path` to the step `last`.

    The learning rate is that of a run of STEPS.
    """
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have workers
    strategy, devices = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    pl.seed_everything(7)
    diary = Diary()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=STEPS,
        callbacks=[diary, Stop(last), DCPCheckpoint(every_n_steps=every, keep_last=None, save_at_end=False)],
        default_root_dir=root,
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_ledger=False,
        enable_throughput=False,
    )
    module = CausalLMModule(
        routed_model("qwen3_moe", **EXPERTS) if experts else tiny_model(),
        tokenizer=tiny_tokenizer(),
        lr=1e-2,
        scheduler="cosine",
        optimizer=OptimizerConfig(args={"eps": 1e-3}),  # far above the rounding of a gradient
        lora=LoRAConfig(rank=4) if lora else None,
    )
    trainer.fit(module, data_of(kind), ckpt_path=ckpt_path)
    return {"steps": diary.steps, "rows": diary.rows, "dp_rank": trainer.strategy.dp_rank}  # type: ignore[attr-defined]


def train(
    pool: RankPool,
    root: Path,
    layout: str,
    lora: bool,
    ckpt_path: str | None = None,
    kind: str = "packed",
    **options: int,
) -> dict[str, Any]:
    """The run on all its ranks: curve, and of every step the rows of the global batch, in one order."""
    ranks = pool.run((LAYOUTS | EXPERT_LAYOUTS)[layout][1], run, root, layout, lora, ckpt_path, kind, **options)
    by_place = {rank["dp_rank"]: rank["rows"] for rank in ranks}
    rows = [sorted(row for place in by_place.values() for row in place[step]) for step in range(len(ranks[0]["steps"]))]
    return {"steps": ranks[0]["steps"], "rows": rows}


def checkpoint(root: Path, step: int = SAVED) -> str:
    return str(root / "checkpoints" / f"step-{step:08d}")


def difference(rest: dict[str, Any], whole: dict[str, Any], same_layout: bool) -> float:
    """Largest relative difference of a step's loss between the rest of a run and the run that was not stopped.

    Raises:
        AssertionError: other steps, learning rates or rows, or a difference that is too large.
    """
    first = rest["steps"][0][0] - 1
    expected = whole["steps"][first : first + len(rest["steps"])]
    assert [(step, rate) for step, _, rate in rest["steps"]] == [(step, rate) for step, _, rate in expected]
    assert rest["rows"] == whole["rows"][first : first + len(rest["rows"])], "the data goes on with other rows"
    worst = max(abs(loss - want) / abs(want) for (_, loss, _), (_, want, _) in zip(rest["steps"], expected))
    assert worst <= (0.0 if same_layout else TOLERANCE), f"the loss differs by {worst:.1e}"
    return worst
