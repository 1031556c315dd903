"""Saving while training: resume against uninterrupted, what is kept, what happens when a save fails."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from automodel_trainer import Trainer
from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.checkpoint import check_checkpoint
from automodel_trainer.checkpoint.record import RecordedFile
from automodel_trainer.checkpoint.state import RUN_KEY
from tests.callbacks.runs import train
from tests.matrix import more
from tests.pool import RankPool


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="lightning.pytorch")  # until the end of the test


def every_step(**options: Any) -> DCPCheckpoint:
    return DCPCheckpoint(**{"every_n_steps": 1, "keep_last": None, **options})


def after(journal: list[Any], step: int) -> list[Any]:
    """What follows the training step `step`."""
    return journal[1 + max(i for i, entry in enumerate(journal) if entry[:2] == ("train", step)) :]


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What the trainer keeps, but for the batches of validation, which Lightning counts on when it resumes."""
    state = json.loads((checkpoint / "trainer.json").read_text())["lightning"]
    loops = state.pop("loops")["fit_loop"]
    return {**state, **{key: value for key, value in loops.items() if "val_loop" not in key}}


def resume_each(root: Path, steps: list[int], devices: int = 1, strategy: str = "auto", **options: Any) -> list[str]:
    """Train without a stop, then resume from each of the steps, each time from what the run before wrote."""
    layout = {"devices": devices, "strategy": strategy}
    whole = train(root / "whole", [every_step()], **layout, **options)
    copy, wrong = root / "copy", []
    if whole["trainer"].is_global_zero:
        shutil.copytree(root / "whole", copy, symlinks=True)
    whole["trainer"].strategy.barrier()
    for step in steps:
        checkpoint = copy / "checkpoints" / f"step-{step:08d}"
        again = train(copy, [every_step()], ckpt_path=checkpoint, **layout, **options)
        states = [state_of(run / "checkpoints" / "latest") for run in (root / "whole", copy)]
        for state in states:
            state[RUN_KEY]["settings"].pop("trainer.default_root_dir")
        wrong += [f"{step}: {key}: {states[1][key]}" for key, value in states[0].items() if value != states[1][key]]
        if again["journal"] != after(whole["journal"], step):
            wrong.append(f"{step}: {again['journal']} instead of {after(whole['journal'], step)}")
        different = [name for name, value in whole["weights"].items() if not torch.equal(value, again["weights"][name])]
        if different or again["trainer"].global_step != whole["trainer"].global_step:
            wrong.append(f"{step}: {different}")
    return wrong


MIDDLE = {"val_check_interval": 3}  # of an epoch
END = {"val_check_interval": 1.0}
ACROSS = {"val_check_interval": 4, "check_val_every_n_epoch": None}  # epochs
NEVER = {"limit_val_batches": 0, "max_steps": 8, "max_epochs": None}  # and a stop in the middle of an epoch


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (MIDDLE, [3, 4, 5]),
        (END, [5, 6]),
        (ACROSS, [4, 5]),
        (NEVER, [1, 5]),
        more(MIDDLE, [1, 6]),
        more(END, [1, 3, 4]),
        more(ACROSS, [1, 3, 6]),
        more(NEVER, [3, 4, 6]),
    ],
    ids=str,
)
@pytest.mark.exact
def test_resumed_is_as_uninterrupted_bit_for_bit(tmp_path: Path, schedule: dict[str, Any], steps: list[int]) -> None:
    """Dropout on. From the middle of an epoch, before and after a validation, and from the end of an epoch."""
    assert resume_each(tmp_path, steps, **schedule) == []


@pytest.mark.parametrize(
    ("strategy", "steps"), [("fsdp2", [3, 5]), ("ddp", [3]), more("ddp", [5])], ids=["fsdp2", "ddp", "ddp, end"]
)
@pytest.mark.exact
def test_resumed_is_as_uninterrupted_on_two_ranks(
    pool: RankPool, tmp_path: Path, strategy: str, steps: list[int]
) -> None:
    assert pool.run(2, resume_each, tmp_path, steps, devices=2, strategy=strategy) == [[], []]


@pytest.mark.exact
def test_a_run_that_ended_can_be_made_longer(tmp_path: Path) -> None:
    """8 steps end in the middle of an epoch; with 10 they go on there."""
    options = {"scheduler": "constant", "max_epochs": None}
    whole = train(tmp_path / "whole", max_steps=10, **options)
    train(tmp_path / "short", max_steps=8, **options)
    longer = train(tmp_path / "short", max_steps=10, ckpt_path="last", **options)
    assert longer["journal"] == after(whole["journal"], 8)
    assert all(torch.equal(value, longer["weights"][name]) for name, value in whole["weights"].items())


@pytest.mark.exact
def test_resumed_from_a_monitored_save_after_validation(tmp_path: Path) -> None:
    callback = DCPCheckpoint(monitor="val_loss", mode="max", keep_best=100, save_at_end=False)
    whole = train(tmp_path / "whole", [callback], val_check_interval=3, max_epochs=3)
    assert callback.best_model_path
    for name in list(callback.scores):
        copy, step = tmp_path / name, int(name[-8:])
        shutil.copytree(tmp_path / "whole", copy, symlinks=True)
        again = train(copy, ckpt_path=copy / "checkpoints" / name, val_check_interval=3, max_epochs=3)
        assert again["journal"] == after(whole["journal"], step)[1:]  # that validation is done
        assert all(torch.equal(value, again["weights"][name]) for name, value in whole["weights"].items())


def test_another_number_of_ranks_goes_on_with_the_next_batch(pool: RankPool, tmp_path: Path) -> None:
    """Without dropout the curve is that of the first run, whatever reads its checkpoint."""
    steps = pool.run(2, losses_of, tmp_path, 2, "fsdp2", 4, None)[0]
    whole = losses_of(tmp_path / "whole", 1, "auto", 10, None)
    for world_size, strategy in [(1, "ddp"), (4, "fsdp2")]:
        copy = tmp_path / strategy
        shutil.copytree(tmp_path / "checkpoints", copy / "checkpoints", symlinks=True)
        rest = pool.run(world_size, losses_of, copy, world_size, strategy, 10, "last")[0]
        assert steps + rest == pytest.approx(whole, rel=1e-4)


def losses_of(root: Path, devices: int, strategy: str, max_steps: int, ckpt_path: str | None) -> list[float]:
    result = train(
        root,
        devices=devices,
        strategy=strategy,
        ckpt_path=ckpt_path,
        max_steps=max_steps,
        max_epochs=None,
        scheduler="constant",
        attention_dropout=0.0,
        limit_val_batches=0,
    )
    return [entry[3] for entry in result["journal"]]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_newest_and_best_are_kept_and_linked(tmp_path: Path) -> None:
    callback = DCPCheckpoint(every_n_steps=2, keep_last=2, monitor="val_loss", keep_best=1)
    result = train(tmp_path, [callback], val_check_interval=3)
    scores = {entry[1]: entry[2] for entry in result["journal"] if entry[0] == "val"}
    best = min(scores, key=scores.__getitem__)
    folder = tmp_path / "checkpoints"
    assert best not in (8, 10), "the best one would be kept for being new"
    assert names(folder) == sorted({"best", "latest", f"step-{best:08d}", "step-00000008", "step-00000010"})
    assert os.readlink(folder / "latest") == "step-00000010"
    assert os.readlink(folder / "best") == f"step-{best:08d}"
    assert callback.last_model_path == str(folder / "step-00000010")
    assert callback.best_model_path == str(folder / f"step-{best:08d}")
    assert callback.best_model_score == scores[best]
    for name in ("latest", "best"):
        check_checkpoint(folder / name)
    assert callback.find_last(tmp_path) == folder / "step-00000010"
    assert callback.find_best(tmp_path) == folder / f"step-{best:08d}"


def test_best_of_the_first_half_is_remembered_by_the_second(tmp_path: Path) -> None:
    def callback() -> DCPCheckpoint:
        return DCPCheckpoint(every_n_steps=5, keep_last=1, monitor="val_loss")

    options = {"scheduler": "constant", "max_epochs": None}
    train(tmp_path / "whole", [kept := callback()], max_steps=10, **options)
    train(tmp_path / "halves", [first := callback()], max_steps=5, **options)
    train(tmp_path / "halves", [resumed := callback()], max_steps=10, ckpt_path="last", **options)
    assert kept.best_model_score == first.best_model_score, "else the second half need not remember"
    assert kept.best_model_score == resumed.best_model_score
    assert names(tmp_path / "whole" / "checkpoints") == names(tmp_path / "halves" / "checkpoints")


def test_default_is_every_epoch_and_the_end(tmp_path: Path) -> None:
    train(tmp_path, max_steps=7, max_epochs=None)
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000005", "step-00000007"]


def test_a_new_run_does_not_touch_an_older_one(tmp_path: Path) -> None:
    for _ in range(3):
        train(tmp_path, max_steps=2, max_epochs=None)
    assert names(tmp_path) == ["checkpoints", "checkpoints-v1", "checkpoints-v2"]
    newest = DCPCheckpoint().find_last(tmp_path)
    assert newest == tmp_path / "checkpoints-v2" / "step-00000002"
    os.truncate(newest / "trainer.json", 10)
    with pytest.warns(UserWarning, match="Skipping a damaged checkpoint: .*trainer.json"):
        assert DCPCheckpoint().find_last(tmp_path, whole=True) == tmp_path / "checkpoints-v1" / "step-00000002"
    assert DCPCheckpoint().find_last(tmp_path) == newest
    train(tmp_path, max_steps=3, max_epochs=None, ckpt_path=tmp_path / "checkpoints" / "latest")
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000002", "step-00000003"]
    assert DCPCheckpoint().find_last(tmp_path / "elsewhere") is None


def test_config_is_saved_beside(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("lr: 1\n")
    train(tmp_path, max_steps=1, max_epochs=None)
    assert (tmp_path / "checkpoints" / "latest" / "config.yaml").read_text() == "lr: 1\n"


class FullDisk(Callback):
    """No space on the last rank while the given steps are saved."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps
        self.patch = pytest.MonkeyPatch()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        self.patch.undo()
        if trainer.global_step in self.steps and trainer.global_rank == trainer.world_size - 1:
            self.patch.setattr(RecordedFile, "write", fail)


def train_with_full_disk(root: Path, devices: int) -> tuple[int, list[str], list[str]]:
    callback = DCPCheckpoint(every_n_steps=2, keep_last=None)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train(root, [FullDisk({4, 6}), callback], devices=devices, strategy="fsdp2" if devices > 1 else "auto")
    return callback.failed_saves, names(root / "checkpoints"), [str(w.message) for w in warned]


@pytest.mark.parametrize("devices", [1, 2])
def test_full_disk_does_not_stop_the_run(pool: RankPool, tmp_path: Path, devices: int) -> None:
    for rank, (failed, left, warned) in enumerate(pool.run(devices, train_with_full_disk, tmp_path, devices)):
        assert failed == 2
        assert left == ["latest", "step-00000002", "step-00000008", "step-00000010"]
        if rank == 0:
            text = "\n".join(warned)
            assert "The checkpoint of step 4 could not be written" in text
            assert "the latest checkpoint is still" in text
            assert "step-00000002" in text
            assert "2 checkpoint(s) of this run could not be written" in text


class Poison(Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == 3:
            with torch.no_grad():
                next(pl_module.model.parameters()).fill_(float("nan"))


def test_a_broken_state_is_never_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step 4 was not finite"):
        train(tmp_path, [Poison(), every_step()])
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000001", "step-00000002", "step-00000003"]
    check_checkpoint(tmp_path / "checkpoints" / "latest")


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0"):
        DCPCheckpoint(every_n_steps=0)
    with pytest.raises(ValueError, match="mode='low'"):
        DCPCheckpoint(mode="low")  # type: ignore[arg-type]


def test_unknown_monitor_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"monitor='val_los'.*val_loss"):
        train(tmp_path, [DCPCheckpoint(monitor="val_los")])


class OwnModule(pl.LightningModule):
    """A user's module with automatic optimization, and hyperparameters."""

    def __init__(self, width: int = 4, extra: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
        self.head = torch.nn.Linear(8, 1)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.head(self.net(batch[0])).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.head(self.net(batch[0])).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def fit_own(
    root: Path, epochs: int, ckpt_path: str | None = None, validate: bool = True, extra: Any = None
) -> OwnModule:
    pl.seed_everything(3)
    rows = torch.utils.data.TensorDataset(torch.randn(16, 4))
    module, monitored = OwnModule(extra=extra), DCPCheckpoint(monitor="val_loss", every_n_epochs=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=2,
        limit_val_batches=1.0 if validate else 0,
        callbacks=[EarlyStopping("val_loss", patience=10), monitored] if validate else None,
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_ledger=False,
        enable_throughput=False,
        num_sanity_val_steps=0,
    )
    loaders = [torch.utils.data.DataLoader(rows, batch_size=4, shuffle=shuffle) for shuffle in (True, False)]
    trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("validate", [True, False])
def test_a_users_module_and_loader_go_on_at_the_end_of_an_epoch(tmp_path: Path, validate: bool) -> None:
    """Shuffling draws from the global generator, dropout and batch statistics are state too."""
    whole = fit_own(tmp_path / "whole", 4, validate=validate)
    losses = []
    for epochs in range(1, 5):
        part = fit_own(tmp_path / "parts", epochs, "last" if epochs > 1 else None, validate=validate)
        losses += part.losses
    assert losses == whole.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, part.state_dict()[name]), name


def test_hyperparameters_that_cannot_be_saved_are_left_out_with_a_word(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"will not hold the hyperparameters extra of OwnModule"):
        fit_own(tmp_path, 1, extra=torch.nn.Linear(1, 1))


def test_weights_only_saves_no_optimizer_state(tmp_path: Path) -> None:
    done = train(tmp_path, max_steps=1)
    done["trainer"].save_checkpoint(tmp_path / "weights", weights_only=True)
    done["trainer"].save_checkpoint(tmp_path / "whole")
    state = {name: list((tmp_path / name / "optimizer").glob("*.safetensors")) for name in ("weights", "whole")}
    assert state["whole"]
    assert not state["weights"]
    assert list((tmp_path / "weights" / "model").glob("*.safetensors"))
    with pytest.raises(ValueError, match=r"the checkpoint contains only the model"):
        train(tmp_path / "again", ckpt_path=tmp_path / "weights", max_steps=2)
