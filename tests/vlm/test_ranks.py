"""Training with pictures on several ranks is that on one device, also where a rank has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from automodel_trainer import ImageTextDataModule, ImageTextModule, LoRAConfig, Trainer
from tests.harness import full
from tests.pool import RankPool
from tests.test_trainer import quiet
from tests.vlm.families import model_of, processor_of, rows

STEPS = 3
FAMILIES = ("qwen3_vl", "gemma3", "idefics3", "internvl", "mllama")


class Steps(pl.Callback):
    """The loss, the gradient norm and the weights of every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        metrics = trainer.callback_metrics
        self.seen.append((float(metrics["train_loss"]), float(metrics["grad_norm"])))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights = {n: full(p).detach().clone() for n, p in pl_module.model.named_parameters() if p.requires_grad}


def run(root: Path, family: str, spec: str, devices: int, lora: bool = False, **options: Any) -> Steps:
    """Train on rows with and without pictures: a step has either kind on either rank."""
    torch.manual_seed(0)
    steps = Steps()
    dm = ImageTextDataModule(
        str(root / "train.jsonl"), seq_len=160, global_batch_size=2, packing=options.pop("packing", False), cache=False
    )
    module = ImageTextModule(
        model_of(family),
        processor=processor_of(family),
        lr=1e-3,
        scheduler="constant",
        lora=LoRAConfig(rank=2) if lora else None,
        optimizer={"args": {"eps": 1e-3}},
        **options,
    )
    trainer = Trainer(
        **quiet(
            root / f"{family}-{spec.replace(':', '-')}-{devices}-{lora}", strategy=spec, devices=devices, max_steps=STEPS,
            log_every_n_steps=1, callbacks=[steps], enable_checkpointing=False,
        )
    )  # fmt: skip
    trainer.fit(module, dm)
    return steps


def on_ranks(root: Path, cases: list[tuple[str, str, bool]]) -> list[Steps]:
    """The cases on the ranks of this job, one after the other."""
    return [run(root, family, spec, 2, lora) for family, spec, lora in cases]


def few(root: Path) -> None:
    """Rows in an order in which every step of two rows has none, one or two with pictures."""
    made = rows(root, 12)
    (root / "train.jsonl").write_text("\n".join(json.dumps(made[i]) for i in (0, 2, 6, 10, 3, 1)))


def assert_same(got: Steps, want: Steps, case: Any) -> None:
    for mine, theirs in zip(got.seen, want.seen, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5), case
    assert got.weights.keys() == want.weights.keys(), case
    for name, weight in want.weights.items():
        torch.testing.assert_close(got.weights[name], weight, rtol=1e-4, atol=2e-6, msg=f"{case} {name}")


def test_two_ranks_are_one_device(pool: RankPool, tmp_path: Path) -> None:
    few(tmp_path)
    cases = [(family, "fsdp2", False) for family in FAMILIES]
    cases += [("qwen3_vl", "ddp", False), ("llava", "ddp", False), ("qwen3_vl", "fsdp2", True), ("llava", "ddp", True)]
    found = pool.run(2, on_ranks, tmp_path, cases)[0]
    for case, got in zip(cases, found):
        family, _, lora = case
        assert_same(got, run(tmp_path, family, "auto", 1, lora), case)
