"""A run goes on from a checkpoint with something changed: every setting on the list, alone and in pairs.

The reference is a plain torch loop that trains the same rows and changes the same things after the same step.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from automodel_trainer import (
    CausalLMModule,
    ChatDataModule,
    LoRAConfig,
    MockDataModule,
    OptimizerConfig,
    SchedulerConfig,
    TextDataModule,
    TokenDataModule,
    Trainer,
)
from automodel_trainer.callbacks import DCPCheckpoint
from automodel_trainer.callbacks.continue_run import ContinueRun
from automodel_trainer.checkpoint.given import (
    continued_schedule,
    given_options,
    given_schedule,
    kept_options,
    note_given,
)
from automodel_trainer.checkpoint.settings import SETTINGS, Meaning, setting_of
from automodel_trainer.models.kernels import KernelsConfig
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
        self.rows.append([i for part in batch for i in part["sample_ids"]])

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


def test_the_next_resume_goes_on_from_the_changed_epoch(saved: tuple[Path, Steps], tmp_path: Path) -> None:
    """Another batch size within an epoch, saved and resumed again within it, and a third size."""
    checkpoint, first = saved
    second = run(tmp_path, {"size": 1, "micro": 1}, Stop(6), ckpt_path=checkpoint)
    third = run(tmp_path, {"size": 2, "epochs": 1}, ckpt_path=tmp_path / "checkpoints" / "step-00000006")
    seen = [i for steps in (first, second, third) for step in steps.rows for i in step if i >= 0]
    assert sorted(seen) == list(range(ROWS))
    assert [len(step) for step in third.rows] == [2, 2, 1]  # 20 rows, less 3 × 4 and 3 × 1


# --- refused and asked for --------------------------------------------------------------------------------------------


def module(**options: Any) -> CausalLMModule:
    return CausalLMModule(tiny_model(**options.pop("config", {})), **{"tokenizer": tiny_tokenizer(), **options})


def fit(root: Path, module: Any, data: Any = None, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=options.pop("max_steps", 2),
        default_root_dir=root,
        logger=False,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_throughput=False,
        **{key: options.pop(key) for key in ("enable_ledger", "enable_checkpointing", "precision") if key in options},
    )
    trainer.fit(module, data or MockDataModule(264, seq_len=16, num_samples=8), **options)
    return trainer


def test_what_is_refused_is_named_with_the_reason(tmp_path: Path) -> None:
    """Each line that is refused, alone; two at once are both named."""
    lora = LoRAConfig(rank=4)
    fit(tmp_path / "lora", module(lora=lora))
    fit(tmp_path / "whole", module())
    added = tiny_tokenizer()
    added.add_tokens(["<new>"])
    refused: list[tuple[str, Any, Any, list[str]]] = [
        ("lora", module(lora=LoRAConfig(rank=8, alpha=8)), None, ["rank 4 → 8"]),
        ("lora", module(lora=LoRAConfig(rank=4, alpha=4)), None, ["alpha"]),
        ("lora", module(lora=LoRAConfig(rank=4, use_dora=True)), None, ["use_dora False → True"]),
        ("lora", module(lora=LoRAConfig(rank=4, use_rslora=True)), None, ["use_rslora"]),
        ("lora", module(lora=LoRAConfig(rank=4, target_modules=["q_proj"])), None, ["target_modules"]),
        ("lora", module(lora=LoRAConfig(rank=4, exclude=["q_proj"])), None, ["exclude"]),
        ("lora", module(lora=LoRAConfig(rank=4, modules_to_save=["lm_head"])), None, ["modules_to_save"]),
        ("lora", module(lora=LoRAConfig(rank=4, init="orthogonal")), None, ["init kaiming → orthogonal"]),
        ("lora", module(lora=LoRAConfig(rank=4, seed=1)), None, ["seed"]),
        ("lora", module(), None, ["adapters → whole model"]),
        ("whole", module(lora=lora), None, ["whole model → adapters"]),
        ("whole", module(tokenizer=added), None, ["model.tokenizer"]),
        ("whole", module(config={"hidden_size": 64}), None, ["hidden_size 32 → 64"]),
        ("whole", module(config={"rms_norm_eps": 0.1}), None, ["rms_norm_eps"]),
        ("whole", module(optimizer="SGD"), None, ["optimizer.name", "SGD"]),
        (
            "whole",
            module(),
            MockDataModule(264, seq_len=32, num_samples=8),
            ["data.rows", "seq_len 16 → 32", "resume='data'"],
        ),
        ("whole", module(), MockDataModule(264, seq_len=16, num_samples=9), ["num_samples 8 → 9"]),
        ("whole", module(), ChatDataModule(chats(), seq_len=64), ["data.class", "data.rows"]),
        ("whole", module(optimizer="SGD", tokenizer=added), None, ["optimizer.name", "model.tokenizer"]),
    ]
    for kind, changed, data, words in refused:
        with pytest.raises(ValueError, match="cannot go on with what has changed") as error:
            fit(tmp_path / kind, changed, data, ckpt_path="last", max_steps=4)
        assert all(word in str(error.value) for word in words), f"{words} not in: {error.value}"
        assert changed.model is None, "refused before anything is built"


def test_taken_over_where_no_number_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dropout, kernels, precision, logging, adapters' dropout and learning rates: the run goes on, and says so."""
    fit(tmp_path / "a", module(config={"attention_dropout": 0.1}))
    changed = module(config={"attention_dropout": 0.3}, neftune_alpha=5.0, kernels=KernelsConfig(loss="whole"))
    trainer = fit(tmp_path / "a", changed, ckpt_path="last", max_steps=4, precision="bf16")
    assert trainer.global_step == 4
    assert changed.model.config.attention_dropout == 0.3
    out = capsys.readouterr().out
    for text in (
        "attention_dropout",
        "0.1 → 0.3",
        "neftune_alpha",
        "0 → 5",
        "kernels.loss",
        "auto → whole",
        "max_steps",
    ):
        assert text in out, out
    assert "(step 2)" in out
    assert "precision" in out
    fit(tmp_path / "b", module(lora=LoRAConfig(rank=4)))
    more = fit(
        tmp_path / "b", module(lora=LoRAConfig(rank=4, dropout=0.2, lr_ratio=1.0)), ckpt_path="last", max_steps=3
    )
    assert more.global_step == 3


def test_new_data_keeps_the_optimizer(tmp_path: Path) -> None:
    """The step and the moments go on; the epoch and the rows begin anew. The same command goes on after that."""
    data = [MockDataModule(264, seq_len=16, num_samples=8, seed=seed) for seed in (0, 1, 1)]
    fit(tmp_path, module(), data[0], max_steps=6)
    moment = {}

    class Look(Callback):
        def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
            moment["step"] = int(trainer.optimizers[0].state_dict()["state"][0]["step"])

    steps = Steps()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[steps, Look(), DCPCheckpoint(every_n_steps=1), Stop(10)],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(module(scheduler="linear", lr=1e-3), data[1], ckpt_path="last", resume="data")
    assert moment["step"] == 6, "Adam goes on"
    assert trainer.global_step == 10
    assert len({i for step in steps.rows for i in step}) == 4
    assert steps.rates == pytest.approx([1e-3 * (1 - step / 14) for step in range(6, 10)])  # 6 steps, and 8 of the data
    again = Steps()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[again],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(module(scheduler="linear", lr=1e-3), data[2], ckpt_path="auto", resume="data")
    assert sorted(i for steps in (steps, again) for step in steps.rows for i in step) == list(range(8))
    assert trainer.global_step == 14


def test_only_the_weights(tmp_path: Path) -> None:
    """A new run: step 0, a fresh optimizer, another folder, any data and optimizer; and the weights."""
    first = fit(tmp_path, module())
    before = {name: value.clone() for name, value in first.lightning_module.model.state_dict().items()}
    seen: dict[str, Any] = {}

    class Look(Callback):
        def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
            seen.update({name: value.clone() for name, value in module.model.state_dict().items()})
            assert trainer.global_step == 0
            assert not trainer.optimizers[0].state

    other = CausalLMModule(tiny_model(seed=9), tokenizer=tiny_tokenizer(), optimizer="SGD")
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, callbacks=Look(), default_root_dir=tmp_path, logger=False
    )
    trainer.fit(other, MockDataModule(264, seq_len=24, num_samples=4), ckpt_path="last", resume="weights")
    assert all(torch.equal(seen[name], value) for name, value in before.items())
    assert trainer.checkpoint_callback.run_folder.name == "checkpoints-v1"  # type: ignore[union-attr]


def test_resume_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    for arguments, words in (
        ({"resume": "weight", "ckpt_path": "last"}, "Allowed: 'all', 'data', 'weights'"),
        ({"resume": "data"}, "give ckpt_path"),
        ({"resume": "weights", "ckpt_path": "auto"}, "would lose the optimizer"),
        ({"resume": "weights", "ckpt_path": str(tmp_path)}, "needs a checkpoint folder"),
        ({"ckpt_path": "last"}, "there is no checkpoint under"),
        ({"ckpt_path": "last", "enable_checkpointing": False}, "there is no checkpoint under"),
        ({"ckpt_path": "best", "enable_checkpointing": False}, "there is no checkpoint under"),
    ):
        with pytest.raises(ValueError, match=words):
            fit(tmp_path, module(), **arguments)  # type: ignore[arg-type]


def test_a_run_that_saves_nothing_still_finds_the_last_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path, module())
    assert fit(tmp_path, module(), ckpt_path="last", enable_checkpointing=False, max_steps=3).global_step == 3
    with pytest.warns(UserWarning, match="nothing is left to train"):
        fit(tmp_path, module(), ckpt_path="last", max_steps=2)


# --- the list ---------------------------------------------------------------------------------------------------------


def test_every_setting_is_on_the_list() -> None:
    def names(cls: type) -> list[str]:
        return [name for name in inspect.signature(cls).parameters if name != "tokenizer"]

    settings = [f"trainer.{name}" for name in names(Trainer)]
    settings += [f"model.{name}" for name in names(CausalLMModule) if name not in ("kernels", "config_overrides")]
    settings += [f"model.kernels.{field.name}" for field in fields(KernelsConfig)]
    settings += [f"model.lora.{field.name}" for field in fields(LoRAConfig)]
    settings += [f"model.optimizer.{field.name}" for field in fields(OptimizerConfig)]
    settings += [f"model.scheduler.{field.name}" for field in fields(SchedulerConfig)]
    for cls in (ChatDataModule, TextDataModule, MockDataModule, TokenDataModule):
        settings += [f"data.{name}" for name in names(cls)]
    lines = [setting.name for setting in SETTINGS]
    lacking = [name for name in settings if not any(fnmatchcase(name, line) for line in lines)]
    assert not lacking, f"what does a change of these mean on resume? {lacking}"
    assert len(set(lines)) == len(lines)
    assert all(setting.reason for setting in SETTINGS if setting.meaning is not Meaning.TAKEN_OVER)
    assert setting_of("model.a_users_own").meaning is Meaning.TAKEN_OVER
    assert any(isinstance(callback, ContinueRun) for callback in Trainer(logger=False).callbacks)  # type: ignore[attr-defined]


def test_the_page_has_the_list() -> None:
    page = (Path(__file__).parents[2] / "docs" / "resume.md").read_text()
    lines = page.partition("<!-- settings -->")[2].partition("<!-- end of settings -->")[0].splitlines()
    for setting in SETTINGS:
        assert any(f"`{setting.name}`" in x and f"| {setting.meaning} | {setting.reason} |" in x for x in lines), (
            setting
        )


# --- schedules of other people ----------------------------------------------------------------------------------------

SCHEDULES: dict[str, list[Any]] = {
    "cosine": [lambda o: CosineAnnealingLR(o, 20), lambda o: CosineAnnealingLR(o, 40, eta_min=1e-4)],
    "step": [lambda o: StepLR(o, 3), lambda o: StepLR(o, 2, gamma=0.5)],
    "exponential": [lambda o: ExponentialLR(o, 0.9), lambda o: StepLR(o, 5)],
    "one cycle": [lambda o: OneCycleLR(o, 0.1, total_steps=30), lambda o: OneCycleLR(o, 0.2, total_steps=60)],
    "lambda": [lambda o: LambdaLR(o, lambda n: 1 / (n + 1)), lambda o: LambdaLR(o, lambda n: 2 / (n + 2))],
    "in turn": [
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=4), ExponentialLR(o, 0.9)], [4]),
        lambda o: SequentialLR(o, [LinearLR(o, 0.2, total_iters=3), ExponentialLR(o, 0.8)], [3]),
    ],
}


def built(make: Any, lr: float) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=lr)
    scheduler = make(optimizer)
    note_given([optimizer], [scheduler])
    return optimizer, scheduler


@pytest.mark.filterwarnings("ignore:Detected call of", "ignore:.*deprecated")
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_changed_schedule_stands_where_it_would_stand(name: str) -> None:
    """Against the changed schedule of torch, stepped from the start; and unchanged, against the one that went on."""
    done, more = 6, 8
    for make, lr in ((SCHEDULES[name][0], 0.01), (SCHEDULES[name][0], 0.003), (SCHEDULES[name][1], 0.01)):
        optimizer, scheduler = built(SCHEDULES[name][0], 0.01)
        for _ in range(done):
            scheduler.step()
        saved = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        same_class = type(make(torch.optim.SGD([torch.zeros(1)], 1.0))) is type(scheduler)
        state = scheduler.state_dict() if same_class else {"last_epoch": done}
        then, schedule_then = given_options(optimizer), given_schedule(scheduler) if same_class else {}
        reference, expected = built(make, lr)
        for _ in range(done):
            expected.step()
        resumed, mine = built(make, lr)
        resumed.param_groups[0].update(kept_options(saved, then[0], given_options(resumed)[0]))  # type: ignore[index]
        mine.load_state_dict(continued_schedule(mine, state, schedule_then, resumed, then))
        for _ in range(more):
            assert resumed.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"], rel=1e-12)
            assert resumed.param_groups[0]["betas"] == pytest.approx(reference.param_groups[0]["betas"])
            expected.step()
            mine.step()


def test_a_plateau_keeps_what_it_has_seen() -> None:
    optimizer, scheduler = built(lambda o: ReduceLROnPlateau(o, patience=1, factor=0.1), 0.01)
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    saved = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    then, state = given_options(optimizer), scheduler.state_dict()
    resumed, mine = built(lambda o: ReduceLROnPlateau(o, patience=4, factor=0.1), 0.02)
    resumed.param_groups[0].update(kept_options(saved, then[0], given_options(resumed)[0]))  # type: ignore[index]
    mine.load_state_dict(continued_schedule(mine, state, given_schedule(scheduler), resumed, then))
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.002)
    assert mine.best == 1.0
    assert mine.patience == 4
