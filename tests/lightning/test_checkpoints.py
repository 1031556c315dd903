"""Checkpoints of ours wherever Lightning reads one, and Lightning's where we read one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from safetensors.torch import load_file

from automodel_trainer import CausalLMModule, LoRAConfig, MockDataModule
from automodel_trainer.callbacks import DCPCheckpoint
from automodel_trainer.checkpoint import manifest
from automodel_trainer.resume import checkpoint_path
from tests.harness import random_rows, stack
from tests.lightning.boring import loader, make, weight
from tests.pool import RankPool
from tests.tiny import tiny_model, tiny_tokenizer


class Adam(BoringModel):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class WeightAtTest(BoringModel):
    def on_test_start(self) -> None:
        self.tested = weight(self)


class Edits(WeightAtTest):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert sorted(checkpoint["state_dict"]) == ["layer.bias", "layer.weight"]
        checkpoint["state_dict"]["layer.weight"] = torch.full((2, 32), 0.5)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = float(checkpoint["state_dict"]["layer.weight"].sum())
        checkpoint["state_dict"]["layer.bias"] = torch.full((2,), 7.0)


def test_hooks_see_and_change_the_weights(tmp_path: Path) -> None:
    trainer = make(tmp_path, enable_checkpointing=False)
    trainer.fit(Edits())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    make(tmp_path).test(module := Edits(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert module.seen == float(module.tested.sum()) == 32.0
    assert module.layer.bias.tolist() == [7.0, 7.0]


def test_averaged_weights_are_saved_and_resumed(tmp_path: Path) -> None:
    """Whole, and stopped after an epoch: the average and the weights under training go on as if never stopped."""
    ends = {}
    for name, epochs in (("whole", [3]), ("parts", [1, 3])):
        path: Any = None
        for until in epochs:
            torch.manual_seed(0)
            last = ModelCheckpoint(dirpath=tmp_path / name, save_last=True)
            callbacks: list[Callback] = [EMAWeightAveraging(decay=0.5), last]
            torch.manual_seed(1)
            rows = [torch.randn(2, 32) for _ in range(4)]
            options = {"limit_train_batches": 4, "limit_val_batches": 0, "callbacks": callbacks}
            make(tmp_path, max_epochs=until, **options).fit(module := Adam(), rows, ckpt_path=path)
            path = last.last_model_path
        ends[name] = weight(module)
        make(tmp_path).test(tested := WeightAtTest(), ckpt_path=path, verbose=False)
        assert torch.equal(tested.tested, ends[name]), "the checkpoint holds the average"
    assert torch.equal(ends["whole"], ends["parts"])


def test_averaged_weights_of_a_hugging_face_model(tmp_path: Path) -> None:
    """The model/ folder of a checkpoint holds the average, and the run goes on with both."""
    data = MockDataModule(264, seq_len=16, micro_batch_size=2, num_samples=8)
    ends = {}
    for name, epochs in (("whole", [2]), ("parts", [1, 2])):
        path: Any = None
        for until in epochs:
            module = CausalLMModule(tiny_model(), tokenizer=tiny_tokenizer(), lr=0.1, scheduler="constant")
            callbacks = [EMAWeightAveraging(decay=0.5), DCPCheckpoint()]
            options = {"limit_train_batches": 4, "limit_val_batches": 0, "callbacks": callbacks}
            path = make(tmp_path / name, max_epochs=until, **options).fit(module, data, ckpt_path=path)
        ends[name] = {key: value.clone() for key, value in module.state_dict().items()}
        saved = load_file(next((path / "model").glob("*.safetensors")))
        assert all(torch.equal(saved[key], ends[name][key]) for key in saved)
    assert all(torch.equal(value, ends["parts"][key]) for key, value in ends["whole"].items())


def edited_and_averaged(root: str, strategy: str) -> tuple[bool, float]:
    """On two ranks: a hook's whole tensors, and state with sharded tensors in it, survive."""

    class Sharded(Edits):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = dict(checkpoint["state_dict"])
            super().on_save_checkpoint(checkpoint)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_load_checkpoint(checkpoint)
            self.mine = checkpoint["mine"]["layer.weight"]

    trainer = make(root, devices=2, strategy=strategy, enable_checkpointing=False)
    trainer.fit(module := Sharded(), [torch.ones(2, 32)] * 2)
    trainer.save_checkpoint(f"{root}/a")
    live = module.layer.weight.detach()
    live = live.full_tensor() if hasattr(live, "full_tensor") else live
    again = Sharded()
    make(root, devices=2, strategy=strategy).fit(again, [torch.ones(2, 32)] * 2, ckpt_path=f"{root}/a")
    return torch.equal(again.mine, live), again.seen


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_hooks_change_sharded_weights(pool: RankPool, tmp_path: Path, strategy: str) -> None:
    assert pool.run(2, edited_and_averaged, str(tmp_path), strategy) == [(True, 32.0)] * 2


def test_pruning_is_made_permanent(tmp_path: Path) -> None:
    prune = ModelPruning("l1_unstructured", parameters_to_prune=None, amount=0.5, make_pruning_permanent=True)
    saved = ModelCheckpoint(dirpath=tmp_path / "saved")
    make(tmp_path, callbacks=[prune, saved], limit_val_batches=0).fit(BoringModel())
    make(tmp_path).test(tested := WeightAtTest(), ckpt_path=saved.best_model_path, verbose=False)
    assert 0.3 < float((tested.tested == 0).float().mean()) < 0.7


def test_evaluation_needs_only_the_weights(tmp_path: Path) -> None:
    trainer = make(tmp_path, callbacks=[ModelCheckpoint(dirpath=tmp_path / "w", save_weights_only=True)])
    trainer.fit(module := Adam())
    assert len(trainer.test(module, ckpt_path="best", verbose=False)) == 1
    trainer.save_checkpoint(tmp_path / "weights", weights_only=True)
    trainer.save_checkpoint(tmp_path / "whole")
    for path in (tmp_path / "weights", tmp_path / "whole"):
        make(tmp_path).test(tested := WeightAtTest(), ckpt_path=path, verbose=False)
        assert torch.equal(tested.tested, weight(module))
        assert len(make(tmp_path).predict(BoringModel(), loader(), ckpt_path=path)) == 4
    with pytest.raises(ValueError, match=r"the checkpoint contains only the model"):
        make(tmp_path).fit(Adam(), ckpt_path=tmp_path / "weights")
    with pytest.raises(TypeError, match=r"with `storage_options` arg is not supported"):
        trainer.save_checkpoint(tmp_path / "x", storage_options={"key": 1})


class More(BoringModel):
    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.extra = torch.nn.Linear(2, 2)
        self.strict_loading = strict


def test_strict_loading(tmp_path: Path) -> None:
    trainer = make(tmp_path, enable_checkpointing=False)
    trainer.fit(module := BoringModel())
    trainer.save_checkpoint(tmp_path / "a")
    more = More(False)
    before = more.extra.weight.detach().clone()
    make(tmp_path).test(more, ckpt_path=tmp_path / "a", verbose=False)
    assert torch.equal(more.extra.weight, before)
    assert torch.equal(weight(more), weight(module))
    with pytest.raises(ValueError, match=r"Missing key\(s\) in state_dict: \"extra.weight\""):
        make(tmp_path).test(More(True), ckpt_path=tmp_path / "a", verbose=False)


class Order(Callback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"x": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls.append("load_state_dict")

    def on_fit_start(self, *args: Any) -> None:
        self.calls.append("on_fit_start")


class Two(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_callbacks_are_restored_before_fit_starts(tmp_path: Path) -> None:
    def resumed(name: str, module: Any, make_callback: Any, *epochs: int) -> tuple[Any, Any]:
        path = None
        for until in epochs:
            torch.manual_seed(1)
            callback, built = make_callback(), module()
            kept = ModelCheckpoint(dirpath=tmp_path / name, save_last=True)
            options = {"limit_train_batches": 4, "limit_val_batches": 0, "callbacks": [callback, kept]}
            torch.manual_seed(2)
            rows = [torch.randn(1, 32) for _ in range(4)]
            trainer = make(tmp_path, max_epochs=until, **options)
            trainer.fit(built, rows, ckpt_path=path)
            path = kept.last_model_path
            assert trainer.current_epoch == until
        return callback, built

    assert resumed("order", BoringModel, Order, 1, 2)[0].calls == ["load_state_dict", "on_fit_start"]
    thawing = partial(BackboneFinetuning, 1, lambda epoch: 1.5)
    (_, whole), (_, parts) = resumed("thawed", Two, thawing, 4), resumed("thawed in parts", Two, thawing, 3, 4)
    assert torch.equal(whole.backbone.weight, parts.backbone.weight), "it goes on being trained"
    averaging = partial(StochasticWeightAveraging, swa_lrs=0.1, swa_epoch_start=1)
    (one, whole), (two, parts) = resumed("a", BoringModel, averaging, 5), resumed("b", BoringModel, averaging, 3, 5)
    assert int(one.n_averaged) == int(two.n_averaged) == 5
    assert torch.equal(weight(whole), weight(parts))


def test_lightnings_loader_reads_our_folder(tmp_path: Path) -> None:
    class Sized(BoringModel):
        def __init__(self, size: int, extra: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters(ignore="extra")
            self.second = torch.nn.Linear(32, size)

    trainer = make(tmp_path)
    trainer.fit(module := Sized(3))
    assert isinstance(trainer.checkpoint_callback, DCPCheckpoint)
    folder = trainer.checkpoint_callback.best_model_path
    for again in (Sized.load_from_checkpoint(folder), Sized.load_from_checkpoint(Path(folder), map_location="cpu")):
        assert again.hparams == {"size": 3}
        assert torch.equal(weight(again), weight(module))
    with pytest.raises(RuntimeError, match=r"second.weight"):
        Sized.load_from_checkpoint(folder, size=4)
    with pytest.raises(ValueError, match=r"manifest.json is missing"):
        Sized.load_from_checkpoint(tmp_path)


def test_an_objective_from_its_checkpoint(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    data = MockDataModule(264, seq_len=16, micro_batch_size=2, num_samples=4, val_samples=2)
    batch = stack(random_rows(2, 16, seed=0))
    for lora in (None, LoRAConfig(rank=2)):
        module = CausalLMModule(tmp_path / "base", lora=lora, lr=0.1)
        trainer = make(tmp_path)
        trainer.fit(module, data)
        inputs = {"input_ids": batch["input_ids"]}
        with torch.no_grad():
            expected = module.model.eval()(**inputs).logits
        again = CausalLMModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)  # type: ignore
        make(tmp_path).validate(again, data, verbose=False)
        with torch.no_grad():
            torch.testing.assert_close(again.model.eval()(**inputs).logits, expected)


def lightnings_file(root: Path, module: pl.LightningModule, epochs: int = 2) -> str:
    trainer = pl.Trainer(
        max_epochs=epochs,
        limit_train_batches=2,
        limit_val_batches=0,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    trainer.fit(module)
    return trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_run_of_lightnings_trainer_goes_on(tmp_path: Path, strategy: str) -> None:
    file = lightnings_file(tmp_path, theirs := Adam())
    trainer = make(tmp_path, max_epochs=3, strategy=strategy)
    trainer.fit(ours := Adam(), ckpt_path=file)
    assert trainer.global_step == 6
    assert int(trainer.optimizers[0].state[ours.layer.weight]["step"]) == 6
    make(tmp_path).test(tested := WeightAtTest(), ckpt_path=file, verbose=False)
    assert torch.equal(tested.tested, weight(theirs))


def from_lightnings_file(root: str, file: str) -> list[float]:
    trainer = make(root, devices=2, strategy="fsdp2", max_epochs=3)
    trainer.fit(module := Adam(), [torch.ones(2, 32)] * 2, ckpt_path=file)
    state = trainer.optimizers[0].state[module.layer.weight]
    return [trainer.global_step, float(state["step"]), float(state["exp_avg"].full_tensor().numel())]


def test_a_run_of_lightnings_trainer_goes_on_sharded(pool: RankPool, tmp_path: Path) -> None:
    file = lightnings_file(tmp_path, Adam())
    assert pool.run(2, from_lightnings_file, str(tmp_path), file) == [[6, 6.0, 64.0]] * 2


class Planted:
    """What runs when a pickle is read."""

    def __reduce__(self) -> Any:
        return exec, ("import pathlib; pathlib.Path('planted').write_text('ran')",)


def test_nothing_in_a_foreign_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted object, and the two hyperparameters of CVE-2026-58659, in a file and in a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('planted').write_text('ran')\ndef make(*a): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    content = torch.load(lightnings_file(tmp_path, BoringModel()), weights_only=False)
    torch.save({**content, "hyper_parameters": {"x": Planted()}}, tmp_path / "object.ckpt")
    with pytest.raises(ValueError, match=r"holds (builtins|__builtin__).exec"):
        make(tmp_path).test(BoringModel(), ckpt_path=tmp_path / "object.ckpt")
    routes: list[dict[str, Any]] = [
        {"_instantiator": "evil.make"},
        {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "evil.Model"},
    ]
    for number, route in enumerate(routes):
        file = tmp_path / f"{number}.ckpt"
        torch.save({**content, "hyper_parameters": route}, file)
        make(tmp_path).test(BoringModel(), ckpt_path=file, verbose=False)
        trainer = make(tmp_path)
        trainer.fit(module := BoringModel())
        module.save_hyperparameters(route)
        trainer.save_checkpoint(tmp_path / f"folder-{number}")
        for path in (file, tmp_path / f"folder-{number}"):
            with pytest.raises(ValueError, match=r"blocked to prevent arbitrary code execution"):
                BoringModel.load_from_checkpoint(path)
    assert not (tmp_path / "planted").exists()


class Known(BoringModel):
    """The first epoch is the best; the weight says which epoch is tested."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.trainer.current_epoch))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.nn.init.constant_(self.layer.weight, self.current_epoch + 1.0)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("w", self.layer.weight.mean())


@pytest.mark.parametrize("monitor", ["val_loss", None])
def test_without_a_model_the_best_is_tested(tmp_path: Path, monitor: str | None) -> None:
    """The best by the monitor, and without one the last, as Lightning's ModelCheckpoint has it."""
    for callback in (ModelCheckpoint(monitor=monitor, dirpath=tmp_path / "theirs"), DCPCheckpoint(monitor=monitor)):
        trainer = make(tmp_path / type(callback).__name__, max_epochs=3, callbacks=[callback])
        trainer.fit(module := Known(), loader(), loader())
        torch.nn.init.constant_(module.layer.weight, 9.0)
        for given in ({"dataloaders": loader()}, {"datamodule": BoringDataModule()}, {}, {"ckpt_path": "best"}):
            tested = trainer.test(**given, verbose=False)[0]["w"]  # type: ignore[arg-type]
            assert tested == pytest.approx(1.0 if monitor else 3.0), (callback, given)


def test_an_evaluation_leaves_the_scores_alone(tmp_path: Path) -> None:
    """A checkpoint is written before its own score is known, so what it remembers is older than the callback."""

    class Falls(BoringModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", -float(self.trainer.global_step))

    for callback in (DCPCheckpoint(monitor="loss"), ModelCheckpoint(monitor="loss", dirpath=tmp_path / "theirs")):
        trainer = make(tmp_path / type(callback).__name__, max_epochs=3, callbacks=[callback])
        trainer.fit(Falls(), loader(), loader())
        best = callback.best_model_path, callback.best_model_score, callback.best_k_models
        for ckpt_path in ("best", callback.best_model_path):
            trainer.validate(Falls(), loader(), ckpt_path, verbose=False)
            assert (callback.best_model_path, callback.best_model_score, callback.best_k_models) == best
            assert callback.best_model_score == -6.0


def test_both_kinds_side_by_side(tmp_path: Path) -> None:
    """The best is that of the callback that monitors, and the last the newest of all, in either order."""
    theirs = ModelCheckpoint(dirpath=tmp_path / "theirs", monitor="val_loss", save_last=True)
    ours = DCPCheckpoint(save_top_k=1)
    for number, callbacks in enumerate(([theirs, ours], [ours, theirs])):
        trainer = make(tmp_path / str(number), max_epochs=2, callbacks=callbacks)
        trainer.fit(Known(), loader(), loader())
        assert trainer.checkpoint_callback is callbacks[0]
        for given, expected in (({}, 1.0), ({"ckpt_path": "best"}, 1.0), ({"ckpt_path": "last"}, 2.0)):
            tested = trainer.test(dataloaders=loader(), **given, verbose=False)[0]["w"]
            assert tested == pytest.approx(expected), (number, given)
        older = tmp_path / str(number) / "checkpoints" / "step-00000004"
        with mock.patch.object(manifest, "stamp", return_value=0.0):
            manifest.write_manifest(older, manifest.read_manifest(older)["files"], older.name)
        assert checkpoint_path(trainer, "last") == str(tmp_path / "theirs" / "last.ckpt")
    monitors = ModelCheckpoint(dirpath=tmp_path / "other", monitor="val_loss")
    with pytest.raises(ValueError, match=r"there is no checkpoint"):  # in a new process nobody knows which is the best
        checkpoint_path(make(tmp_path / "0", callbacks=[DCPCheckpoint(), monitors]), "best")


class Halved(CausalLMModule):
    """Saves half of each adapter, and no frozen weight."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value / 2 for name, value in state.items() if "lora_" in name}


class Touched(CausalLMModule):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"]["model.norm.weight"] = checkpoint["state_dict"]["model.norm.weight"] + 1


def test_hooks_change_adapters(tmp_path: Path) -> None:
    data = MockDataModule(264, seq_len=16, micro_batch_size=2, num_samples=4)
    module = Halved(tiny_model(), tokenizer=tiny_tokenizer(), lora=LoRAConfig(rank=2), lr=0.1)
    path = make(tmp_path, limit_val_batches=0).fit(module, data)
    assert path is not None
    saved = load_file(path / "model" / "adapter_model.safetensors")
    live = {name: value for name, value in module.state_dict().items() if "lora_" in name}
    assert len(saved) == len(live) > 0
    for name, value in live.items():
        assert torch.equal(saved[f"base_model.model.{name}"], value / 2), name
        assert value.any(), name
    touched = Touched(tiny_model(), tokenizer=tiny_tokenizer(), lora=LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"changed or added .*model.norm.weight.* holds only its adapters"):
        make(tmp_path / "b", limit_val_batches=0).fit(touched, data)


def test_a_file_without_loops(tmp_path: Path) -> None:
    """Another program wrote it: weights and optimizers, no place in the data."""
    module = BoringModel()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1).state_dict()]
    state = {"state_dict": module.state_dict(), "optimizer_states": optimizers, "lr_schedulers": []}
    torch.save({**state, "pytorch-lightning_version": "2.0.0", "epoch": 0, "global_step": 0}, tmp_path / "a.ckpt")
    trainer = make(tmp_path)
    trainer.fit(BoringModel(), ckpt_path=tmp_path / "a.ckpt")
    assert trainer.global_step == 2


def test_a_checkpoint_is_opened_before_a_module_is_attached(tmp_path: Path) -> None:
    """`trainer.strategy.connect(module)`, then `load_checkpoint`, as other programs do."""
    folder = make(tmp_path).fit(BoringModel())
    trainer = make(tmp_path)
    trainer.strategy.connect(BoringModel())
    assert trainer.strategy.load_checkpoint(folder)["global_step"] == 2
