"""The training loss of each source of a mixture, against the model's own logits, on one device and on layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback

from automodel_trainer import CausalLMModule, ChatDataModule, Trainer
from automodel_trainer.callbacks import DCPCheckpoint
from automodel_trainer.modules.optim import OptimizerConfig
from tests.pool import RankPool
from tests.tiny import tiny_model, tiny_tokenizer

WORDS = {"a": "aaaa", "b": "bb"}


def chats(word: str, count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": word * (1 + i % 3)}]}
        for i in range(count)
    ]


class Reference(Callback):
    """The loss of the rows with either word, from the model's logits before the step: summed over two steps."""

    def __init__(self) -> None:
        self.sums = dict.fromkeys(WORDS, 0.0)
        self.tokens = dict.fromkeys(WORDS, 0)
        self.found: list[dict[str, float]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        for micro_batch in batch:
            with torch.no_grad():
                ids, mask = micro_batch["input_ids"], micro_batch["attention_mask"]
                logits = module.model(input_ids=ids, attention_mask=mask).logits
            for row, labels in enumerate(micro_batch["labels"]):
                text = tiny_tokenizer().decode(labels[labels >= 0])
                name = next((name for name, word in WORDS.items() if word in text), None)
                if name is not None:  # a filler has no labels
                    losses = F.cross_entropy(logits[row, :-1], labels[1:], ignore_index=-100, reduction="sum")
                    self.sums[name] += float(losses)
                    self.tokens[name] += int((labels[1:] >= 0).sum())

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % 2:
            return
        self.found.append({name: total / self.tokens[name] for name, total in self.sums.items() if self.tokens[name]})
        logged = {key.removeprefix("train_loss/"): float(v) for key, v in trainer.logged_metrics.items() if "/" in key}
        self.logged.append({name: logged[name] for name in WORDS if name in logged})
        self.__dict__.update(sums=dict.fromkeys(WORDS, 0.0), tokens=dict.fromkeys(WORDS, 0))


def run(
    root: str, strategy: str, reference: bool = False, packing: bool = False, every: int = 2, ckpt_path: Any = None
) -> Any:
    train = [{"path": chats(word, 8), "weight": 1, "name": name} for name, word in WORDS.items()]
    data = ChatDataModule(
        train, tokenizer=tiny_tokenizer(), seq_len=64, packing=packing, micro_batch_size=2, global_batch_size=4
    )
    module = CausalLMModule(
        tiny_model(), tokenizer=tiny_tokenizer(), lr=1e-3, optimizer=OptimizerConfig(args={"eps": 1e-3})
    )
    watch = Reference()
    logs: list[dict[str, float]] = []

    class Logged(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            logs.append({key: float(v) for key, v in trainer.logged_metrics.items() if key.startswith("train_loss")})

    saves = [DCPCheckpoint(every_n_steps=3, save_at_end=False)] if every > 2 else []
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy,
        max_epochs=1,
        default_root_dir=root,
        callbacks=[watch if reference else Logged(), *saves],
        log_every_n_steps=every,
        logger=False,
        enable_progress_bar=False,
        enable_ledger=False,
        enable_checkpointing=every > 2,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return (watch.found, watch.logged) if reference else logs[every - 1 :: every] or logs


def test_as_the_logits_say(tmp_path: Path) -> None:
    """Over two steps of two micro-batches each, of rows of both sources."""
    found, logged = run(str(tmp_path), "auto", reference=True)
    assert len(found) == 2
    for ours, theirs in zip(logged, found):
        assert set(ours) == set(WORDS)
        assert ours == pytest.approx(theirs, rel=1e-5)


LAYOUTS = {"fsdp2": 2, "fsdp2:tp=2": 2, "fsdp2:cp=2": 2, "3d:pp=2": 2}


@pytest.mark.parametrize("strategy", LAYOUTS)
def test_on_every_layout(pool: RankPool, tmp_path: Path, strategy: str) -> None:
    packing = "cp" in strategy
    expected = run(str(tmp_path / "one"), "auto", packing=packing)
    assert set(expected[0]) == {"train_loss", "train_loss/a", "train_loss/b"}
    for logs in pool.run(LAYOUTS[strategy], run, str(tmp_path / "two"), strategy, False, packing):
        assert len(logs) == len(expected)
        for ours, theirs in zip(logs, expected):
            assert ours == pytest.approx(theirs, rel=2e-5)


def test_sums_go_on_after_a_resume(tmp_path: Path) -> None:
    """Saved after step 3; the log of step 4 is that of all four."""
    (whole,) = run(str(tmp_path), "auto", every=4)
    path = tmp_path / "checkpoints" / "step-00000003"
    (rest,) = run(str(tmp_path / "b"), "auto", every=4, ckpt_path=path)
    assert set(whole) == {"train_loss", "train_loss/a", "train_loss/b"}
    assert rest == pytest.approx(whole, rel=1e-6)
