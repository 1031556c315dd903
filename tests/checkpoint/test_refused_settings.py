"""What a run cannot go on with is refused by name, new data and weights alone are asked for, and the list is whole."""

from __future__ import annotations

import inspect
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Subset

from automodel_trainer import (
    CausalLMModule,
    ChatDataModule,
    ImageTextDataModule,
    ImageTextModule,
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
from automodel_trainer.checkpoint.settings import SETTINGS, Meaning, changes, setting_of
from automodel_trainer.models.kernels import KernelsConfig
from tests.checkpoint.test_changed_settings import Steps, chats
from tests.harness import Stop
from tests.tiny import tiny_model, tiny_tokenizer


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
        ("lora", module(), None, ["adapters → whole model", "from the exported model"]),
        ("whole", module(lora=lora), None, ["whole model → adapters"]),
        ("whole", module(tokenizer=added), None, ["model.tokenizer"]),
        (
            "whole",
            module(config={"hidden_size": 64}),
            None,
            ["hidden_size 32 → 64", "which must have the shapes of the model: fit(resume='weights')"],
        ),
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


def _loader(change: int, kind: str) -> Any:
    ids = torch.randint(5, 260, (8, 16), generator=torch.Generator().manual_seed(0))
    ids[5] += change
    rows = [{"input_ids": row, "labels": row} for row in ids]
    table = Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in rows])
    return {
        "list": lambda: DataLoader(rows, batch_size=2),
        "table": lambda: DataLoader(table.with_format("torch"), batch_size=2),  # type: ignore[arg-type]
        "part": lambda: DataLoader(Subset(rows, [0, 5, 2, 3, 1, 7]), batch_size=1),  # type: ignore[arg-type]
        "batches": lambda: [{key: value[None] for key, value in row.items()} for row in rows],
    }[kind]()


def _stream(change: int, kind: str) -> TextDataModule:
    rows = [{"text": f"row {i + 100 * change} of a stream of text"} for i in range(30)]
    source = {
        "rows": rows,
        "stream": Dataset.from_list(rows).to_iterable_dataset(),
        "mixture": [{"path": Dataset.from_list(rows), "weight": 1}, {"path": rows[:10], "weight": 1}],
    }[kind]
    return TextDataModule(source, seq_len=16, streaming=True, shuffle_buffer=1)


def test_an_alpha_that_was_not_given_is_twice_the_rank() -> None:
    without, given = {"model.lora.rank": 4, "model.lora.alpha": None}, {"model.lora.rank": 4, "model.lora.alpha": 8.0}
    other = given | {"model.lora.alpha": 16.0}
    assert changes(without, given) == changes(given, without) == changes({"model.lora.rank": 4}, given) == []
    assert [change.name for change in changes(without, other)] == ["model.lora.alpha"]


def _peft(seed: int = 0, alpha: int = 8) -> CausalLMModule:
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"])
    return CausalLMModule(peft.get_peft_model(tiny_model(seed=seed), config), tokenizer=tiny_tokenizer())


def test_another_object_in_memory_is_noticed(tmp_path: Path) -> None:
    """Of a model under adapters, and of data: the same values go on, others are refused, whatever holds them."""

    def of_seed(seed: int, dtype: torch.dtype = torch.float32) -> CausalLMModule:
        lora = LoRAConfig(rank=4)
        return CausalLMModule(tiny_model(seed=seed).to(dtype), tokenizer=tiny_tokenizer(), lora=lora)

    fit(tmp_path / "base", of_seed(0))
    with pytest.raises(ValueError, match=r"(?s)model\.base_values .*other base weights.*from the exported model"):
        fit(tmp_path / "base", of_seed(1), ckpt_path="last", max_steps=3)
    again = of_seed(0, torch.bfloat16)
    for steps in (3, 4):  # the second time with the module that was laid out
        assert fit(tmp_path / "base", again, ckpt_path="last", max_steps=steps).global_step == steps
    fit(tmp_path / "peft", _peft())
    for changed, message in ((_peft(seed=1), "model.base_values"), (_peft(alpha=64), "lora.alpha 8 → 64")):
        with pytest.raises(ValueError, match=message):
            fit(tmp_path / "peft", changed, ckpt_path="last", max_steps=3)
    assert fit(tmp_path / "peft", _peft(), ckpt_path="last", max_steps=3).global_step == 3

    same = module(lora=LoRAConfig(rank=4, alpha=8, target_modules=["q_proj"]))
    assert fit(tmp_path / "peft", same, ckpt_path="last", max_steps=4).global_step == 4, "the same without PEFT"

    given = [(_loader, kind) for kind in ("list", "table", "part", "batches")]
    for make, kind in [*given, *((_stream, kind) for kind in ("rows", "stream", "mixture"))]:
        root = tmp_path / kind
        fit(root, module(), make(0, kind))
        with pytest.raises(ValueError, match=r"data\.rows .*: the training rows are others"):
            fit(root, module(), make(1, kind), ckpt_path="last", max_steps=3)
        assert fit(root, module(), make(0, kind), ckpt_path="last", max_steps=3).global_step == 3, kind
    root, asked = tmp_path / "list", {"ckpt_path": "last", "resume": "data"}
    assert fit(root, module(), _loader(1, "list"), max_steps=5, **asked).global_step == 5
    steps = Steps()
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=6, default_root_dir=root, logger=False, callbacks=[steps],
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module(), _loader(1, "list"), **asked)
    rows = _loader(1, "list").dataset
    assert torch.equal(steps.batches[0]["input_ids"][1], rows[5]["input_ids"]), "the same command goes on in the epoch"


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


def test_weights_that_are_evaluated_in_another_model_are_named(tmp_path: Path, recwarn: Any) -> None:
    data = MockDataModule(264, seq_len=16, num_samples=8, val_samples=4)
    fit(tmp_path, module(lora=LoRAConfig(rank=4)), data)
    trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    trainer.validate(module(lora=LoRAConfig(rank=4, dropout=0.1)), data, ckpt_path="last")
    assert not [w for w in recwarn if "was trained otherwise" in str(w.message)]
    other = module(lora=LoRAConfig(rank=4, alpha=64), config={"rms_norm_eps": 0.1})
    with pytest.warns(UserWarning, match=r"(?s)was trained otherwise.*lora\.alpha 8 → 64.*rms_norm_eps"):
        trainer.validate(other, data, ckpt_path="last")


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
        return [name for name in inspect.signature(cls).parameters if name not in ("tokenizer", "kwargs")]

    settings = [f"trainer.{name}" for name in names(Trainer)]
    settings += [f"model.{name}" for name in names(CausalLMModule) if name not in ("kernels", "config_overrides")]
    settings += [f"model.kernels.{field.name}" for field in fields(KernelsConfig)]
    settings += [f"model.lora.{field.name}" for field in fields(LoRAConfig)]
    settings += [f"model.optimizer.{field.name}" for field in fields(OptimizerConfig)]
    settings += [f"model.scheduler.{field.name}" for field in fields(SchedulerConfig)]
    settings += [f"model.{name}" for name in names(ImageTextModule)]
    for cls in (ChatDataModule, TextDataModule, MockDataModule, TokenDataModule, ImageTextDataModule):
        settings += [f"data.{name}" for name in names(cls)]
    lines = [setting.name for setting in SETTINGS]
    lacking = [name for name in settings if not any(fnmatchcase(name, line) for line in lines)]
    assert not lacking, f"what does a change of these mean on resume? {lacking}"
    assert len(set(lines)) == len(lines)
    assert all(setting.reason for setting in SETTINGS if setting.meaning is not Meaning.TAKEN_OVER)
    assert setting_of("model.a_users_own").meaning is Meaning.TAKEN_OVER
    assert any(isinstance(callback, ContinueRun) for callback in Trainer(logger=False).callbacks)  # type: ignore[attr-defined]


def test_options_of_strategies_and_callbacks_are_in_the_table(tmp_path: Path) -> None:
    """They are taken over, and said."""

    def run(steps: int, every: int, reshard: bool, **options: Any) -> list[str]:
        from automodel_trainer.strategies import FSDP2Strategy

        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=steps, default_root_dir=tmp_path, logger=False,
            strategy=FSDP2Strategy(reshard_after_forward=reshard), callbacks=[DCPCheckpoint(every_n_steps=every)],
            enable_progress_bar=False,
        )  # fmt: skip
        trainer.fit(module(), MockDataModule(264, seq_len=16, num_samples=8), **options)
        found = next(c for c in trainer.callbacks if isinstance(c, ContinueRun))  # type: ignore[attr-defined]
        return [str(change) for change in found.changes]

    run(2, 1, True)
    changes = run(4, 2, False, ckpt_path="last")
    assert "trainer.strategy.reshard_after_forward True → False" in changes
    assert "trainer.callbacks.DCPCheckpoint.every_n_steps 1 → 2" in changes


def test_the_page_has_the_list() -> None:
    page = (Path(__file__).parents[2] / "docs" / "resume.md").read_text()
    lines = page.partition("<!-- settings -->")[2].partition("<!-- end of settings -->")[0].splitlines()
    for setting in SETTINGS:
        assert any(f"`{setting.name}`" in x and f"| {setting.meaning} | {setting.reason} |" in x for x in lines), (
            setting
        )
