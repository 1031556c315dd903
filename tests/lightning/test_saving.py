"""When and where checkpoints are written, who is told, and what they keep: ModelCheckpoint's names, URLs, loggers."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger

from automodel_trainer.callbacks import DCPCheckpoint, HFExport
from automodel_trainer.callbacks._loggers import upload_folders
from automodel_trainer.checkpoint.remote import local_root
from tests.lightning.boring import loader, make

SCORES = [3.0, 1.0, 4.0, 1.5, 5.0]  # of each epoch


class Scored(BoringModel):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", SCORES[self.trainer.current_epoch])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train_score", SCORES[self.trainer.current_epoch])
        return super().training_step(batch, batch_idx)


def saved(run: Path) -> list[str]:
    """The steps that a folder has checkpoints of, or their names."""
    names = sorted(path.name for path in run.iterdir() if path.is_dir() and not path.is_symlink())
    return [str(int(name.removeprefix("step-"))) if name.startswith("step-0") else name for name in names]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [  # two steps an epoch, five epochs
        ({"monitor": "val_loss", "save_top_k": 2}, ["4", "8"]),
        ({"monitor": "val_loss", "save_top_k": 1, "mode": "max"}, ["10"]),
        ({"monitor": "val_loss", "save_top_k": -1}, ["2", "4", "6", "8", "10"]),
        ({"monitor": "val_loss", "save_top_k": 1, "save_last": True}, ["4", "10"]),
        ({"monitor": "val_loss", "save_top_k": 1, "every_n_epochs": 2}, ["4"]),
        ({"monitor": "val_loss", "save_top_k": 1, "every_n_train_steps": 6}, ["6"]),
        ({"monitor": "train_score", "save_top_k": 2, "save_on_train_epoch_end": True}, ["4", "8"]),
        ({"save_top_k": 1}, ["10"]),
        ({"save_top_k": 1, "every_n_train_steps": 3}, ["9"]),
        ({"save_top_k": -1, "every_n_epochs": 2}, ["4", "8"]),
        ({"save_top_k": 0}, []),
        ({"save_top_k": 1, "filename": "{epoch}-{val_loss:.1f}", "monitor": "val_loss"}, ["epoch=1-val_loss=1.0"]),
        ({"filename": "fixed", "keep_last": 2}, ["fixed", "fixed-v1"]),
        ({"filename": "fixed", "enable_version_counter": False}, ["fixed"]),
        ({"train_time_interval": timedelta(0), "save_top_k": -1}, [str(step) for step in range(1, 11)]),
    ],
    ids=str,
)
def test_modelcheckpoints_arguments(tmp_path: Path, arguments: dict[str, Any], expected: list[str]) -> None:
    callback = DCPCheckpoint(**arguments)
    make(tmp_path, max_epochs=5, callbacks=[callback]).fit(Scored(), loader(), loader())
    run = tmp_path / "checkpoints"
    found = saved(run) if run.is_dir() else []
    assert sorted(found) == sorted(expected)
    if expected:
        assert (run / "latest").resolve().name in os.listdir(run)
        assert callback.best_model_path.endswith(os.readlink(run / ("best" if "monitor" in arguments else "latest")))
        make(tmp_path).test(Scored(), ckpt_path=callback.best_model_path, verbose=False)


@pytest.mark.parametrize("arguments", [{"save_top_k": 2}, {"save_top_k": 1, "save_last": True}], ids=str)
def test_as_modelcheckpoint_itself(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """The steps that Lightning's own callback has at the end, and its best."""
    theirs = ModelCheckpoint(dirpath=tmp_path / "theirs", monitor="val_loss", filename="{step}", **arguments)
    ours = DCPCheckpoint(monitor="val_loss", filename="{step}", **arguments)
    make(tmp_path, max_epochs=5, callbacks=[theirs, ours]).fit(Scored(), loader(), loader())
    own = {name.removesuffix(".ckpt") for name in os.listdir(tmp_path / "theirs")} - {"last"}
    last = {"step=10"} if "save_last" in arguments else set()
    assert set(saved(tmp_path / "checkpoints")) == own | last
    assert Path(ours.best_model_path).name == Path(theirs.best_model_path).stem
    assert ours.best_model_score == theirs.best_model_score
    assert {Path(path).name for path in ours.best_k_models} == {Path(path).stem for path in theirs.best_k_models}


def test_arguments_that_cannot_be_meant() -> None:
    for arguments, message in (
        ({"save_top_k": 3}, "without monitor"),
        ({"save_top_k": -2}, "-1 keeps all"),
        ({"every_n_steps": 2, "every_n_train_steps": 3}, "both mean the same"),
        ({"keep_best": 2, "save_top_k": 3, "monitor": "x"}, "both mean the same"),
        ({"filename": "a/b"}, "Leave out '/'"),
        ({"save_last": "copy"}, "Allowed: True, False, 'link'"),
    ):
        with pytest.raises(ValueError, match=message):
            DCPCheckpoint(**arguments)  # type: ignore[arg-type]


class Trouble(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise RuntimeError("trouble")
        return super().training_step(batch, batch_idx)


def test_saved_when_training_fails(tmp_path: Path) -> None:
    callback = DCPCheckpoint(save_on_exception=True, save_weights_only=True, verbose=True)
    with pytest.raises(RuntimeError, match="trouble"):
        make(tmp_path, callbacks=[callback]).fit(Trouble())
    assert saved(tmp_path / "checkpoints") == ["1"]
    make(tmp_path).test(BoringModel(), ckpt_path=callback.last_model_path, verbose=False)


def test_another_strategy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not under SingleDeviceStrategy"):
        make(tmp_path, strategy="single_device", callbacks=[DCPCheckpoint()]).fit(BoringModel())


def test_urls_are_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the root folder, of ModelCheckpoint and of `save_checkpoint`; nothing is left in the working folder."""
    monkeypatch.chdir(tmp_path)
    store = fsspec.filesystem("memory")
    root = "memory://bucket/run"
    trainer = make(root, max_epochs=2)
    trainer.fit(module := BoringModel())
    assert store.exists("/bucket/run/checkpoints/step-00000004/manifest.json")
    assert make(root, max_epochs=3).fit(BoringModel(), ckpt_path="last").name == "step-00000006"  # type: ignore
    theirs = ModelCheckpoint(dirpath="memory://bucket/theirs", save_top_k=1)
    make(tmp_path / "run", callbacks=[theirs], max_epochs=3).fit(BoringModel())
    assert [Path(path).name for path in store.ls("/bucket/theirs", detail=False)] == ["epoch=2-step=6.ckpt"]
    make(tmp_path / "run").test(BoringModel(), ckpt_path=theirs.best_model_path, verbose=False)
    trainer.save_checkpoint("memory://bucket/final.ckpt")
    assert store.exists("/bucket/final.ckpt/manifest.json")
    again = BoringModel.load_from_checkpoint("memory://bucket/final.ckpt")
    assert torch.equal(again.layer.weight, module.layer.weight)
    assert os.listdir(tmp_path) == ["run"]
    assert local_root(root).is_dir()
    for local in (partial(HFExport, root), partial(trainer.save_pretrained, root)):
        with pytest.raises(ValueError, match=r"writes to a local folder|no model in this process"):
            local()


class Told(CSVLogger):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.paths: list[str] = []

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.paths.append(Path(checkpoint_callback.last_model_path or checkpoint_callback.best_model_path).name)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_loggers_are_told_of_checkpoints(tmp_path: Path, asynchronous: bool) -> None:
    logger = Told(tmp_path / "log")
    make(tmp_path, logger=logger, max_epochs=3, callbacks=[DCPCheckpoint(async_save=asynchronous)]).fit(BoringModel())
    assert logger.paths == ["step-00000002", "step-00000004", "step-00000006"]


def test_wandb_and_mlflow_get_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's loggers upload files only; here with stand-ins for the two packages' clients."""
    callback = DCPCheckpoint(monitor="val_loss", save_top_k=1)
    make(tmp_path, max_epochs=3, callbacks=[callback]).fit(Scored(), loader(), loader())
    calls: list[Any] = []

    class Artifact:
        def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
            calls.append(("artifact", name, metadata["score"]))

        def add_dir(self, path: str) -> None:
            calls.append(("dir", path))

    monkeypatch.setitem(__import__("sys").modules, "wandb", SimpleNamespace(Artifact=Artifact))
    experiment = SimpleNamespace(
        id="7",
        log_artifact=lambda artifact, aliases: calls.append(aliases),
        log_artifacts=lambda run, path, place: calls.append((run, path, place)),
        log_dict=lambda run, about, place: calls.append((about["aliases"], place)),
    )
    for kind in (WandbLogger, MLFlowLogger):
        logger = object.__new__(kind)
        logger.__dict__.update(_log_model="all", _logged_model_time={}, _checkpoint_name=None, _run_id="r")
        logger.__dict__.update(add_file_policy="mutable") if kind is WandbLogger else None
        monkeypatch.setattr(kind, "experiment", experiment)
        monkeypatch.setattr(kind, "run_id", "r", raising=False)
        upload_folders([logger])
        upload_folders([logger])
        for _ in range(2):  # the second time nothing is new
            logger.after_save_checkpoint(callback)
    best = callback.best_model_path
    assert calls == [
        ("artifact", "model-7", 1.0),
        ("dir", best),
        ["latest", "best"],
        ("r", best, "step-00000004"),
        (["latest", "best"], "step-00000004/about.json"),
    ]


class Keeps(BoringModel):
    def __init__(self, extra: Any = None, rate: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_hyperparameters_that_are_no_plain_data(tmp_path: Path) -> None:
    """They are left out with a word, before training; OmegaConf's are kept as plain data."""
    kept: dict[str, Any] = {"a set": {1, 2}, "none": None}
    left_out: dict[str, Any] = {"a module": torch.nn.MSELoss(), "a partial": partial(torch.optim.SGD, lr=1)}
    for name, value in {**kept, **left_out}.items():
        trainer = make(tmp_path / name)
        if name in left_out:
            with pytest.warns(UserWarning, match=r"will not hold the hyperparameters extra of Keeps"):
                trainer.fit(Keeps(value))
        else:
            trainer.fit(Keeps(value))
        path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        assert Keeps.load_from_checkpoint(path, rate=0.25).hparams == {
            "rate": 0.25,
            "extra": kept.get(name),
        }


def test_omegaconf(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    value = omegaconf.OmegaConf.create({"a": [1, 2], "b": {"c": 1, "d": "${a}"}})
    trainer = make(tmp_path)
    trainer.fit(Keeps(value))
    again = Keeps.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    assert again.hparams["extra"] == {"a": [1, 2], "b": {"c": 1, "d": [1, 2]}}
