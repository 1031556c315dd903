"""The Trainer takes what Lightning's takes: positional arguments, several loaders, limits, names of strategies."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data import WeightedRandomSampler as Weighted

from automodel_trainer import DDPStrategy, Trainer
from tests.lightning.boring import loader, make


@pytest.mark.parametrize("name", ["fit", "validate", "test", "predict"])
def test_signatures_are_lightnings(name: str) -> None:
    """`data` is a second name that LightningCLI must not see; `resume` is our own."""
    ours, theirs = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (Trainer, pl.Trainer))
    assert ours == theirs + ["resume"] * (name == "fit")


def test_positional_arguments(tmp_path: Path) -> None:
    make(tmp_path).fit(BoringModel(), None, None, BoringDataModule())
    trainer = make(tmp_path)
    assert len(trainer.validate(BoringModel(), loader(), None, False)) == 1
    assert len(trainer.test(BoringModel(), loader(), None, False)) == 1
    assert len(trainer.predict(BoringModel(), loader(), None, True)) == 4
    assert len(trainer.predict(BoringModel(), data=loader())) == 4
    with pytest.raises(ValueError, match=r"data or train_dataloaders=, not both"):
        trainer.fit(BoringModel(), loader(), data=loader())


class Recorder(BoringModel):
    def __init__(self, batch_size: int = 2, lr: float = 1e-3) -> None:
        super().__init__()
        self.batch_size, self.lr = batch_size, lr
        self.seen: list[Any] = []
        self.rows: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = list(batch.values()) if isinstance(batch, dict) else batch if isinstance(batch, list) else [batch]
        self.seen.append(tuple(len(part) for part in parts))
        self.rows += [int(value) for value in parts[0][:, 0]]
        return super().training_step(parts[0], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append((dataloader_idx, type(batch)))

    test_step = predict_step = validation_step  # type: ignore[assignment]

    def train_dataloader(self) -> DataLoader:
        return loader(64, batch_size=self.batch_size)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Counted(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.randn(8, 32))

    def __len__(self) -> int:
        return 8


def test_several_loaders_are_loaders(tmp_path: Path) -> None:
    pair = [loader(), loader()]
    kinds = {
        "list": pair,
        "tuple": tuple(pair),
        "dict": {"a": pair[0], "b": pair[1]},
        "nested": [pair],
        "combined": CombinedLoader(pair, "sequential"),
    }
    both = {(0, torch.Tensor), (1, torch.Tensor)}
    trainer = make(tmp_path, limit_test_batches=1, limit_predict_batches=1, enable_checkpointing=False)
    for kind, loaders in kinds.items():
        for run in (trainer.validate, trainer.test, trainer.predict):
            module = Recorder()
            run(module, loaders)
            assert set(module.seen) == both, (kind, run)
    module = Recorder()
    trainer.validate(module, [DataLoader(Counted(), batch_size=4)])
    assert set(module.seen) == {(0, torch.Tensor)}
    trainer.validate(module := Recorder(), [torch.randn(2, 32), torch.randn(2, 32)])
    assert module.seen == [(0, torch.Tensor)], "a list of batches is one loader"
    for loaders in (pair, {"a": pair[0], "b": pair[1]}):
        make(tmp_path, limit_val_batches=0, enable_checkpointing=False).fit(module := Recorder(), loaders)
        assert module.seen == [(1, 1), (1, 1)]
    make(tmp_path, enable_checkpointing=False).fit(module := Recorder(), loader(), pair)
    assert both <= set(module.seen)


class StopAlways(Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = True


def test_lower_limits_are_kept(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_epochs=None, min_epochs=5, callbacks=[StopAlways()], enable_checkpointing=False)
    trainer.fit(BoringModel())
    assert trainer.current_epoch == 5
    rows = [torch.ones(2, 32)] * 2
    options: dict[str, Any] = {"max_epochs": None, "limit_val_batches": 0, "enable_checkpointing": False}
    for least, epochs in ((9, 5), (4, 3)):  # the default is 3 epochs
        trainer = make(tmp_path, min_steps=least, callbacks=[StopAlways()] if least == 9 else None, **options)
        trainer.fit(BoringModel(), rows)
        assert trainer.current_epoch == epochs
    with pytest.raises(ValueError, match=r"min_steps=9 needs an upper limit"):
        make(tmp_path, min_steps=9, **options).fit(BoringModel())
    for limits in ({"min_epochs": 5, "max_epochs": 3}, {"min_steps": 5, "max_steps": 3}):
        with pytest.raises(ValueError, match=r"min_(steps|epochs)="):
            make(tmp_path, **{"max_epochs": None, **limits})
    assert make(tmp_path, max_epochs=None, min_steps=9, max_steps=10).min_steps == 9


class Uneven:
    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1, 2], [3], [4, 5]])

    def __len__(self) -> int:
        return 3


class OwnSampler(BatchSampler):
    def __init__(self, sampler: Any, batch_size: int, drop_last: bool, temperature: float = 1.0) -> None:
        super().__init__(sampler, batch_size, drop_last)


def test_one_device_uses_a_loader_as_it_is(tmp_path: Path) -> None:
    rows = torch.arange(16.0).repeat(32, 1).T.contiguous()  # row i is all i
    loaders = {
        "replacement": (DataLoader(rows, sampler=RandomSampler(rows, True, 10)), [1] * 10),  # type: ignore[arg-type]
        "weighted": (DataLoader(rows, sampler=Weighted([1.0] * 16, 7)), [1] * 7),  # type: ignore[arg-type]
        "own": (DataLoader(rows, batch_sampler=OwnSampler(SequentialSampler(rows), 4, False)), [4] * 4),  # type: ignore
        "uneven": (DataLoader(rows, batch_sampler=Uneven()), [3, 1, 2]),  # type: ignore[arg-type]
        "in order": (DataLoader(rows, batch_size=2), [2] * 8),  # type: ignore[arg-type]
    }
    for name, (given, sizes) in loaders.items():
        module = Recorder()
        options = {"limit_train_batches": 1.0, "limit_val_batches": 0, "enable_checkpointing": False}
        make(tmp_path, **options).fit(module, given)
        assert [size for (size,) in module.seen] == sizes, name
        if name == "in order":
            assert module.rows == list(range(16))


def test_tuners(tmp_path: Path) -> None:
    assert Tuner(make(tmp_path)).scale_batch_size(Recorder(), max_trials=2) == 4
    assert Tuner(make(tmp_path)).lr_find(Recorder(), num_training=20, update_attr=False) is not None
    options = {"limit_val_batches": 0, "enable_checkpointing": False, "limit_train_batches": 1.0}
    finder = LearningRateFinder(num_training_steps=20)
    torch.manual_seed(1)  # from some data twenty steps suggest nothing, to Lightning's own Trainer neither
    make(tmp_path, callbacks=[finder], **options).fit(module := Recorder())
    assert finder.optimal_lr is not None
    assert module.lr == finder.optimal_lr.suggestion()
    make(tmp_path, callbacks=[BatchSizeFinder(max_trials=2)], **options).fit(module := Recorder())
    assert module.batch_size > 2


def test_strategies_by_lightnings_names(tmp_path: Path) -> None:
    assert isinstance(make(tmp_path, strategy="DDP").strategy, DDPStrategy)
    spawned = make(tmp_path, strategy="ddp_spawn_find_unused_parameters_true").strategy
    assert isinstance(spawned, DDPStrategy)
    assert (spawned.launcher_name, spawned.ddp_options["find_unused_parameters"]) == ("spawn", True)
    assert make(tmp_path, strategy="ddp_notebook").strategy.launcher_name == "fork"  # type: ignore[attr-defined]
    trainer = make(tmp_path, strategy="single_device")
    trainer.fit(BoringModel())
    assert Path(trainer.checkpoint_callback.best_model_path).suffix == ".ckpt"  # type: ignore[union-attr]


def test_a_mac_falls_back_to_the_cpu(tmp_path: Path) -> None:
    place = "lightning.pytorch.accelerators.mps.MPSAccelerator"
    with (
        mock.patch(f"{place}.is_available", return_value=True),
        mock.patch(f"{place}.auto_device_count", return_value=1),
        mock.patch(f"{place}.get_parallel_devices", return_value=[torch.device("mps", 0)]),
        mock.patch("lightning.fabric.accelerators.mps._get_all_available_mps_gpus", return_value=[0]),
    ):
        with pytest.warns(UserWarning, match=r"The CPU is used, not MPS"):
            trainer = make(tmp_path, accelerator="auto")
        assert trainer.strategy.root_device.type == "cpu"
        assert make(tmp_path, accelerator="mps").strategy.root_device.type == "mps"
        with pytest.raises(ValueError, match=r"strategy='fsdp2' does not run on MPS"):
            make(tmp_path, accelerator="mps", strategy="fsdp2")


def test_a_plain_torch_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model is a Linear. It must be a `LightningModule`"):
        make(tmp_path).fit(torch.nn.Linear(2, 2), loader())  # type: ignore[arg-type]


def test_barebones_refuses_what_it_would_ignore(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"log_every_n_steps=1\)` was passed"):
        Trainer(barebones=True, log_every_n_steps=1)


def test_loaders_are_those_of_the_call(tmp_path: Path) -> None:
    class Module(BoringModel):
        def on_validation_start(self) -> None:
            self.seen = [len(self.trainer.val_dataloaders)]

        def on_test_start(self) -> None:
            self.seen = [len(self.trainer.test_dataloaders)]

        def on_predict_start(self) -> None:
            self.seen = [len(self.trainer.predict_dataloaders)]

    trainer, module = make(tmp_path), Module()
    trainer.fit(module, loader(4), loader(3))
    assert module.seen == [3]
    for number in (5, 6):
        trainer.validate(module, loader(number), verbose=False)
        assert module.seen == [number] == [len(trainer.val_dataloaders)]
        trainer.test(module, loader(number + 2), verbose=False)
        assert module.seen == [number + 2]
        trainer.predict(module, loader(number + 4))
        assert module.seen == [number + 4]
