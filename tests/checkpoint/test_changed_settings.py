"""A run goes on from a checkpoint with something changed: every setting on the list, alone and in pairs.

The reference is a plain torch loop that trains the same rows and changes the same things after the same step.
"""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from automodel_trainer import (
    CausalLMModule,
    ChatDataModule,
    OptimizerConfig,
    SchedulerConfig,
    Trainer,
)
from automodel_trainer.callbacks import DCPCheckpoint
from tests.harness import Stop
from tests.limits import check_within
from tests.tiny import tiny_model, tiny_tokenizer

ROWS, SAVED = 20, 3
START: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 0.01,
    "betas": (0.9, 0.999),
    "clip": 0.5,
    "shape": "cosine",
    "warmup": 2,
    "min_lr_ratio": 0.0,
    "epochs": 2,
    "steps": None,
    "size": 4,
    "micro": 2,
    "seed": 0,
    "drop_last": False,
    "limit": None,
}
CHANGES: dict[str, Any] = {
    "lr": 2e-3,
    "weight_decay": 0.3,
    "betas": (0.7, 0.95),
    "clip": 0.05,
    "shape": "linear",
    "warmup": 5,
    "min_lr_ratio": 0.2,
    "epochs": 3,
    "steps": 9,
    "size": 6,
    "micro": 1,
    "seed": 5,
    "drop_last": True,
    "limit": 4,
}
EPS = 1e-3  # far above the rounding of a gradient


class Steps(Callback):
    """Learning rate, loss, rows and tensors of every step."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.rows.append([i for part in batch for i in part["sample_ids"]] if isinstance(batch, list) else [])

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        self.rates.append(float(module._lr))
        self.losses.append(float(trainer.callback_metrics.get("train_loss", math.nan)))


def chats() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 30, (ROWS,), generator=draw).tolist()
    turns = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": chr(97 + i % 26) * n}]
        for i, n in enumerate(lengths)
    ]
    return [{"messages": turn} for turn in turns]


def run(root: Path, options: dict[str, Any], *more: Callback, **fit: Any) -> Steps:
    """A run with these options."""
    o = {**START, **options}
    steps = Steps()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=o["epochs"],
        max_steps=o["steps"] or -1,
        limit_train_batches=o["limit"],
        gradient_clip_val=o["clip"],
        callbacks=[steps, DCPCheckpoint(every_n_steps=SAVED, keep_last=None, save_at_end=False), *more],
        default_root_dir=root,
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_ledger=False,
        enable_throughput=False,
    )
    module = CausalLMModule(
        tiny_model(),
        tokenizer=tiny_tokenizer(),
        lr=o["lr"],
        optimizer=OptimizerConfig(weight_decay=o["weight_decay"], args={"betas": o["betas"], "eps": EPS}),
        scheduler=SchedulerConfig(o["shape"], warmup_steps=o["warmup"], min_lr_ratio=o["min_lr_ratio"]),
    )
    data = ChatDataModule(
        chats(),
        seq_len=128,
        packing=False,
        micro_batch_size=o["micro"],
        global_batch_size=o["size"],
        seed=o["seed"],
        drop_last=o["drop_last"],
    )
    trainer.fit(module, data, **fit)
    return steps


# --- the reference ----------------------------------------------------------------------------------------------------


def expected_sizes(o: dict[str, Any]) -> list[int]:
    """Rows of each step after the saved one, from the arithmetic of epochs alone."""
    epoch = ROWS if o["limit"] is None else min(ROWS, o["limit"] * o["size"])
    sizes: list[int] = []
    for left in [epoch - SAVED * START["size"], *[epoch] * (o["epochs"] - 1)]:
        full, rest = divmod(left, o["size"])
        sizes += [o["size"]] * full + ([rest] if rest and not o["drop_last"] else [])
    return sizes[: o["steps"] - SAVED] if o["steps"] else sizes


def expected_rate(o: dict[str, Any], step: int, total: int) -> float:
    if step < o["warmup"]:
        return float(o["lr"] * (step + 1) / o["warmup"])
    progress = (step - o["warmup"]) / max(1, total - o["warmup"])
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if o["shape"] == "cosine" else 1 - progress
    return float(o["lr"] * (o["min_lr_ratio"] + (1 - o["min_lr_ratio"]) * shape))


def plain_losses(batches: list[Any], rates: list[float], o: dict[str, Any]) -> list[float]:
    """Plain torch: the first steps as START says, the later ones as `o` says."""
    model = tiny_model()
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": START["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=START["betas"], eps=EPS)
    losses = []
    for step, (batch, rate) in enumerate(zip(batches, rates)):
        clip = START["clip"]
        if step >= SAVED:
            groups[0]["weight_decay"], clip = o["weight_decay"], o["clip"]
            for group in optimizer.param_groups:
                group["betas"] = o["betas"]
            optimizer.param_groups[0]["weight_decay"] = o["weight_decay"]
        for group in optimizer.param_groups:
            group["lr"] = rate
        total, tokens = torch.zeros(()), 0
        for part in batch:
            logits = model(part["input_ids"], attention_mask=part["attention_mask"], position_ids=part["position_ids"])
            labels = F.pad(part["labels"][:, 1:], (0, 1), value=-100)
            total = total + F.cross_entropy(logits.logits.flatten(0, 1), labels.flatten(), reduction="sum")
            tokens += int((part["labels"] != -100).sum())
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()) / tokens)
    return losses


# --- one checkpoint, every change -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Steps]:
    """A run that stopped after three of the five steps of its first epoch."""
    root = tmp_path_factory.mktemp("saved")
    first = run(root, {}, Stop(SAVED))
    return root / "checkpoints" / f"step-{SAVED:08d}", first


def covering(names: list[str], size: int) -> list[tuple[str, ...]]:
    """Sets of names such that every pair is in one of them."""
    open_pairs, sets = {frozenset(pair) for pair in combinations(names, 2)}, []
    while open_pairs:
        chosen: list[str] = []
        while len(chosen) < size:
            rest = [name for name in names if name not in chosen]
            chosen.append(
                max(rest, key=lambda n: (sum(frozenset((n, c)) in open_pairs for c in chosen), degree(n, open_pairs)))
            )
        open_pairs -= {frozenset(pair) for pair in combinations(chosen, 2)}
        sets.append(tuple(chosen))
    return sets


def degree(name: str, pairs: set[frozenset[str]]) -> int:
    return sum(name in pair for pair in pairs)


SETS = [(name,) for name in CHANGES] + covering(list(CHANGES), 6)


@pytest.mark.parametrize("part", range(3))
def test_every_change_is_taken_over_alone_and_in_pairs(saved: tuple[Path, Steps], tmp_path: Path, part: int) -> None:
    """Learning rates and rows as computed apart, and the losses of plain torch."""
    checkpoint, first = saved
    for number, names in enumerate(SETS[part::3]):
        changed = {name: CHANGES[name] for name in names}
        o = {**START, **changed}
        rest = run(tmp_path / str(number), changed, ckpt_path=checkpoint)
        sizes = expected_sizes(o)
        rows = [[i for i in step if i >= 0] for step in rest.rows]
        assert [len(step) for step in rows] == sizes, names
        epoch = [i for step in [*first.rows, *rows[: sizes_of_first_epoch(sizes, o)]] for i in step]
        assert len(set(epoch)) == len(epoch), f"{names}: a row twice in an epoch"
        total = SAVED + len(sizes)
        rates = [expected_rate(o, SAVED + i, total) for i in range(len(sizes))]
        assert rest.rates == pytest.approx(rates, rel=1e-12), names
        plain = plain_losses([*first.batches, *rest.batches], [*first.rates, *rates], o)
        worst = max(abs(a - b) / b for a, b in zip([*first.losses, *rest.losses], plain))
        check_within(f"loss with {names} changed", worst, 1e-4, "fp32, and another order of sums")


def sizes_of_first_epoch(sizes: list[int], o: dict[str, Any]) -> int:
    epoch = ROWS if o["limit"] is None else min(ROWS, o["limit"] * o["size"])
    full, rest = divmod(epoch - SAVED * START["size"], o["size"])
    return min(len(sizes), full + (1 if rest and not o["drop_last"] else 0))


@pytest.mark.parametrize("changed", [{"limit": SAVED}, {"limit": SAVED - 1}, {"limit": 2, "size": 6, "micro": 2}])
def test_an_epoch_that_a_new_limit_has_ended(saved: tuple[Path, Steps], tmp_path: Path, changed: dict) -> None:
    """The checkpoint stands where the epoch now ends, or beyond: the next one begins, and no epoch is added."""
    o = {**START, "epochs": 3, **changed}
    rest = run(tmp_path, {"epochs": 3, **changed}, ckpt_path=saved[0])
    sizes = [o["size"]] * (2 * o["limit"])
    assert [len([i for i in step if i >= 0]) for step in rest.rows] == sizes
    rates = [expected_rate(o, SAVED + i, SAVED + len(sizes)) for i in range(len(sizes))]
    assert rest.rates == pytest.approx(rates, rel=1e-12)


def test_the_next_resume_goes_on_from_the_changed_epoch(saved: tuple[Path, Steps], tmp_path: Path) -> None:
    """Another batch size within an epoch, saved and resumed again within it, and a third size."""
    checkpoint, first = saved
    second = run(tmp_path, {"size": 1, "micro": 1}, Stop(6), ckpt_path=checkpoint)
    third = run(tmp_path, {"size": 2, "epochs": 1}, ckpt_path=tmp_path / "checkpoints" / "step-00000006")
    seen = [i for steps in (first, second, third) for step in steps.rows for i in step if i >= 0]
    assert sorted(seen) == list(range(ROWS))
    assert [len(step) for step in third.rows] == [2, 2, 1]  # 20 rows, less 3 × 4 and 3 × 1
