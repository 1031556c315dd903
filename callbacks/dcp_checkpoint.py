"""When to save: every so many steps or epochs, at the best validation score, at the end; and what to keep."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from automodel_trainer.callbacks.resumed_loops import go_on, resume_with_validation, validates_after
from automodel_trainer.checkpoint import CheckpointError, remove_checkpoint, save_checkpoint
from automodel_trainer.checkpoint.background import BackgroundSaver
from automodel_trainer.checkpoint.codec import encode
from automodel_trainer.checkpoint.folder import link
from automodel_trainer.checkpoint.remote import RemoteRuns, download_best, download_last, is_remote, mirror
from automodel_trainer.checkpoint.runs import (
    BEST,
    LATEST,
    find_best,
    find_last,
    new_run,
    runs,
    saved_in,
    step_folder,
    step_of,
)
from automodel_trainer.checkpoint.state import CONFIG_KEY, RNG_KEY
from automodel_trainer.distributed.restarts import remember

LAST_WAIT = 20.0  # seconds that a failing run waits for the save in flight
SLOW = 1.0  # seconds that a save may hold training up without a word


class DCPCheckpoint(Checkpoint):
    """Saves `<dirpath>/step-00000010`, and links `latest` and `best` to checkpoints that are whole.

    A checkpoint holds all that training needs to go on as if it had never stopped; its `model/` is a Hugging Face
    folder. It is written to another name and renamed when it is whole, so a crash leaves the one before as the latest.
    Where a save fails (a full disk), training goes on to the next one, with a warning.

    A new run does not mix with checkpoints that are there already: it takes `checkpoints-v1`, `-v2`, … A resumed run
    goes on in the folder that it was resumed from.

    Args:
        dirpath: by default `<default_root_dir>/checkpoints`. A URL of object storage (`s3://bucket/run`, `gs://…`):
            checkpoints are written there as ever and then copied to the store, whose copies are kept and removed alike.
        every_n_steps: optimizer steps between saves.
        every_n_epochs: epochs between saves, each after the last step of an epoch. 1 where neither is given and nothing
            is monitored.
        keep_last: newest checkpoints to keep; None keeps all.
        monitor: a logged validation metric; each validation that is among the `keep_best` best is saved.
        mode: whether a lower (`min`) or a higher (`max`) score is better.
        keep_best: best checkpoints to keep beside the newest.
        save_at_end: save the last step.
        async_save: training waits only while weights and optimizer state are copied into host memory (as much of it as
            a rank's share of the checkpoint); files are written in the background, one save at a time. What could not
            be written is reported with the next save, or at the end.

    Attributes:
        last_model_path: the newest checkpoint that is known to be whole, or "".
        best_model_path, best_model_score: the best one and its score, or "" and None.
        failed_saves: how many could not be written.
        longest_save: seconds of the run's slowest save until it was whole on disk; None before the first.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        keep_last: int | None = 3,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        keep_best: int = 1,
        save_at_end: bool = True,
        async_save: bool = False,
    ) -> None:
        counts = {"every_n_steps": every_n_steps, "every_n_epochs": every_n_epochs, "keep_last": keep_last}
        for name, value in {**counts, "keep_best": keep_best}.items():
            if value is not None and value < 1:
                raise ValueError(f"DCPCheckpoint({name}={value}): it must be at least 1, or None.")
        if mode not in ("min", "max"):
            raise ValueError(f"DCPCheckpoint(mode={mode!r}) is unknown. Allowed: min, max.")
        if every_n_steps is None and every_n_epochs is None and monitor is None:
            every_n_epochs = 1
        self.remote = RemoteRuns(str(dirpath)) if is_remote(dirpath) else None
        self.dirpath = None if dirpath is None or self.remote is not None else Path(dirpath)
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.keep_last, self.keep_best = keep_last, keep_best
        self.monitor, self.mode = monitor, mode
        self.save_at_end, self.async_save = save_at_end, async_save
        self.run_folder: Path | None = None
        self.last_model_path = ""
        self.scores: dict[str, float] = {}
        self.failed_saves = 0
        self.longest_save: float | None = None
        self._requested = False
        self._last_step = 0
        self._last_saved = -1
        self._validation_due = False
        self._rng: dict[str, Any] | None = None
        self._saver: BackgroundSaver | None = None
        self._newest: Path | None = None
        self._mirror: Any = None
        self._trained_since, self._slow = 0.0, False

    # --- looking back -----------------------------------------------------------------------------------------------

    def find_last(self, default_root_dir: str | Path, whole: bool = False) -> Path | None:
        """The newest checkpoint of this and earlier runs, with `whole` the newest that is not damaged; or None."""
        base = self._base(default_root_dir)
        local = find_last(base, whole)
        return local if self.remote is None else download_last(self.remote, base, local, whole)

    def find_best(self, default_root_dir: str | Path) -> Path | None:
        """The best checkpoint of the newest run that has one."""
        base = self._base(default_root_dir)
        return find_best(base) if self.remote is None else download_best(self.remote, base)

    @property
    def best_model_path(self) -> str:
        ranked = self._ranked()
        return str(self.run_folder / ranked[0]) if ranked and self.run_folder is not None else ""

    @property
    def best_model_score(self) -> float | None:
        ranked = self._ranked()
        return self.scores[ranked[0]] if ranked else None

    # --- Lightning's hooks --------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        owners = (pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        for owner in filter(None, owners):  # before the first step, not at the first save
            encode(dict(owner.hparams), f"{type(owner).__name__}.hparams")
        self.run_folder, self.scores, self.last_model_path = None, {}, ""
        self._last_saved, self.failed_saves, self.longest_save = -1, 0, None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit" or not trainer.ckpt_path:
            return
        self._rng = checkpoint.get(RNG_KEY)
        resumed = Path(trainer.ckpt_path).resolve()
        base = self._base(trainer.default_root_dir).absolute()
        if resumed.parent in [run.resolve() for run in runs(base)]:
            self.run_folder, self.last_model_path = resumed.parent, str(resumed)
            self._last_saved = checkpoint["global_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._rng is not None:
            go_on(trainer, self._rng)
            self._rng = None
        self._last_step = trainer.global_step
        self._trained_since, self._slow = time.monotonic(), False
        self._saver = BackgroundSaver() if self.async_save else None
        self._newest = Path(self.last_model_path) if self.last_model_path else None  # the one resumed from
        if self.run_folder is None:
            # Rank 0 looks for all: another rank could already see what rank 0 has written.
            base = self._base(trainer.default_root_dir).absolute()
            taken = self.remote.runs() if self.remote is not None and trainer.is_global_zero else ()
            self.run_folder = trainer.strategy.broadcast(new_run(base, taken) if trainer.is_global_zero else None)
        if trainer.is_global_zero:
            remember(self.run_folder)  # type: ignore[arg-type]
        if self.remote is not None and self.run_folder is not None:
            base_name = self._base(trainer.default_root_dir).name
            self._mirror = partial(mirror, self.remote, self.run_folder.name.removeprefix(base_name))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = self._is_due(trainer)
        self._last_step = trainer.global_step
        if due:
            self._validation_due |= validates_after(trainer)
            self._save(trainer, pl_module)
            self._validation_due = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        name, score = step_folder(trainer.global_step), self._monitored(trainer)
        if math.isnan(score):
            return
        others = {other: value for other, value in self.scores.items() if other != name}
        self.scores = {**others, name: score}
        if name not in self._ranked()[: self.keep_best] or not self._save(trainer, pl_module):
            self.scores = others

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle()
        if self.save_at_end:
            self._save(trainer, pl_module)
        self._settle()
        if self._saver is not None:
            self._saver.close()
            self._saver = None
        if self.failed_saves:
            rank_zero_warn(
                f"{self.failed_saves} checkpoint(s) of this run could not be written. The last good one is "
                f"{self.last_model_path or 'none'}."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        saver, self._saver = self._saver, None
        if saver is None or saver.in_flight is None:
            return
        folder = saver.in_flight
        try:
            if saver.wait(LAST_WAIT):
                self.last_model_path = str(folder)
            else:
                rank_zero_warn(f"{folder} was not written within {LAST_WAIT} seconds after the error, and is given up.")
        except (CheckpointError, ValueError) as error:
            rank_zero_warn(f"The checkpoint that was being written is lost: {error}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        config = Path(trainer.default_root_dir) / "config.yaml"
        if config.is_file():
            checkpoint[CONFIG_KEY] = config.read_text()
        if self._validation_due:
            resume_with_validation(checkpoint["loops"]["fit_loop"])

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores), "monitor": self.monitor, "mode": self.mode}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (state_dict["monitor"], state_dict["mode"]) == (self.monitor, self.mode) and self.run_folder is not None:
            there = {folder.name for folder in saved_in(self.run_folder)}
            self.scores = {name: score for name, score in state_dict["scores"].items() if name in there}

    # --- saving -----------------------------------------------------------------------------------------------------

    def request_save(self, trainer: pl.Trainer) -> None:
        """Save the step that has just run; to be called on every rank, in `on_train_batch_end`."""
        self._requested = True
        # Looked up now: who asks for a last save may be about to switch validation off.
        self._validation_due = validates_after(trainer)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        if self._requested:
            self._requested = False
            return True
        if self.every_n_steps and step // self.every_n_steps > self._last_step // self.every_n_steps:
            return True
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs and trainer.is_last_batch and epoch % self.every_n_epochs == 0:
            return True
        # The last step is saved here rather than at the end, where Lightning takes any epoch for a finished one.
        last_epoch = trainer.is_last_batch and epoch == trainer.max_epochs
        stops = trainer.should_stop and step >= (trainer.min_steps or 0) and not trainer.min_epochs
        return self.save_at_end and (step == trainer.max_steps or last_epoch or stops)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Save the step unless it is saved; False if that failed. An async save has then only begun."""
        assert self.run_folder is not None
        folder = self.run_folder / step_folder(trainer.global_step)
        if self._last_saved == trainer.global_step:
            self._tidy_if(folder, trainer)
            return True
        if callable(check := getattr(pl_module, "check_finite", None)):
            check()  # raises rather than have a broken state saved over a good one
        begun = time.monotonic()
        self._settle()
        if self._saver is not None:
            self._report_slow(folder, time.monotonic() - begun)
        whole = partial(self._on_whole, folder) if trainer.is_global_zero else None
        try:
            save: Any = None
            if self._saver is not None:
                save = partial(self._saver.save, then=whole, mirror=self._mirror)
            elif self._mirror is not None:
                save = partial(save_checkpoint, mirror=self._mirror)
            trainer.save_checkpoint(folder, weights_only=False, storage_options=save)
        except CheckpointError as error:
            self._report(folder, error)
            return False
        self._last_saved = trainer.global_step
        if self._saver is None:
            self._note_time(time.monotonic() - begun)
            self._report_slow(folder, time.monotonic() - begun)
            self.last_model_path = str(folder)
            if whole is not None:
                whole()
            trainer.strategy.barrier("DCPCheckpoint")
        return True

    def _settle(self) -> None:
        """Wait for the save in flight, on all ranks, and take note of how it ended."""
        folder = None if self._saver is None else self._saver.in_flight
        if self._saver is None or folder is None:
            return
        try:
            self._saver.wait()
        except CheckpointError as error:
            self._report(folder, error)
            self.scores = {name: score for name, score in self.scores.items() if name != folder.name}
            self._last_saved = -1
        else:
            self._note_time(self._saver.seconds)
            self.last_model_path = str(folder)

    def _note_time(self, seconds: float) -> None:
        self.longest_save = max(self.longest_save or 0.0, seconds)

    def _report_slow(self, folder: Path, waited: float) -> None:
        """Say once if training waits for the disk for longer than it trained since the save before."""
        trained, self._trained_since = time.monotonic() - waited - self._trained_since, time.monotonic()
        if waited > max(SLOW, trained) and not self._slow:
            self._slow = True
            what = "the checkpoint before that of" if self._saver is not None else "the checkpoint of"
            hint = "" if self._saver is not None else ", or with async_save=True"
            rank_zero_warn(
                f"Training waited {waited:.1f} s for {what} step {step_of(folder)}, after {trained:.1f} s of training: "
                f"the disk is slow for saves this frequent. Save less often{hint}."
            )

    def _report(self, folder: Path, error: CheckpointError) -> None:
        self.failed_saves += 1
        rank_zero_warn(
            f"The checkpoint of step {step_of(folder)} could not be written: {error}. Training goes on; the latest "
            f"checkpoint is still {self.last_model_path or 'none'}."
        )

    def _on_whole(self, folder: Path) -> None:
        """On rank 0, as soon as a checkpoint is whole: in the thread that wrote it."""
        saver = self._saver  # a run that fails lets go of it
        with saver.lock if saver is not None else nullcontext():
            self._newest = folder
            self._tidy(folder)

    def _tidy_if(self, folder: Path, trainer: pl.Trainer) -> None:
        """Tidy again, now that a checkpoint has a score; while it is being written, the thread will do so."""
        with self._saver.lock if self._saver is not None else nullcontext():
            if trainer.is_global_zero and self._newest == folder:
                self._tidy(folder)
        if self._saver is None:
            trainer.strategy.barrier("DCPCheckpoint")

    def _tidy(self, newest: Path) -> None:
        """Move the links, then remove what is to be kept no longer."""
        run = newest.parent
        best = self._ranked()[: self.keep_best]
        try:
            link(run / LATEST, newest.name)
            saved = saved_in(run)
            if best and run / best[0] in saved:
                link(run / BEST, best[0])
            keep = {newest.name, *best, *(folder.name for folder in saved[-(self.keep_last or len(saved)) :])}
            for folder in saved:
                if folder.name not in keep:
                    remove_checkpoint(folder)
            if self.remote is not None:
                links = {LATEST: newest.name, **({BEST: best[0]} if best else {})}
                self.remote.tidy(self._mirror.args[1], keep, links)
        except OSError as error:
            rank_zero_warn(f"{newest} is written, but links or old checkpoints in {run} could not be changed: {error}")

    def _ranked(self) -> list[str]:
        """Names of scored checkpoints, the best first; of equal ones the earlier."""
        sign = 1 if self.mode == "min" else -1
        return sorted(self.scores, key=lambda name: (sign * self.scores[name], name))

    def _monitored(self, trainer: pl.Trainer) -> float:
        assert self.monitor is not None
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"DCPCheckpoint(monitor={self.monitor!r}): no such metric was logged in validation. There are: "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'none'}."
            )
        # Ranks that decide by different numbers would wait for each other for ever.
        return float(trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor])))

    def _base(self, default_root_dir: str | Path) -> Path:
        return self.dirpath or Path(default_root_dir) / "checkpoints"
