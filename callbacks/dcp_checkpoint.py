"""DCPCheckpoint: when to save (steps, epochs, best validation score, end), and which checkpoints to keep."""

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

from automodel_trainer.callbacks.check_writable import check_checkpoints
from automodel_trainer.callbacks.resumed_loops import continue_loops, resume_with_validation, validates_after
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
SLOW = 1.0  # seconds that training may wait for a save without a warning


class DCPCheckpoint(Checkpoint):
    """Saves `<dirpath>/step-00000010`, and links `latest` and `best` to complete checkpoints.

    A checkpoint holds everything that training needs to continue as if it had never stopped. Its `model/` is a Hugging
    Face folder. It is written under a temporary name and renamed when it is complete, so after a crash the previous
    checkpoint is still the latest. If a save fails (for example, because the disk is full), training continues with a
    warning.

    A new run never writes into a folder that has checkpoints: it uses `checkpoints-v1`, `-v2`, … A resumed run
    continues in the folder that it was resumed from.

    Args:
        dirpath: the folder of the run; by default `<default_root_dir>/checkpoints`. It may be a URL of object storage
            (`s3://bucket/run`, `gs://…`). Then checkpoints are written to the default folder and copied to the store,
            and copies are removed together with their originals.
        every_n_steps: optimizer steps between saves.
        every_n_epochs: epochs between saves, each after the last step of an epoch. If neither is given and nothing is
            monitored, it is 1.
        keep_last: number of newest checkpoints to keep; None keeps all.
        monitor: a logged validation metric. After each validation whose score is among the `keep_best` best, the step
            is saved.
        mode: whether a lower (`min`) or a higher (`max`) score is better.
        keep_best: number of best checkpoints to keep besides the newest ones.
        save_at_end: save the last step.
        async_save: training waits only until weights and optimizer state are copied to host memory, which takes as
            much memory as this rank's share of the checkpoint. Files are written in the background, one save at a
            time. A failed write is reported with the next save, or at the end.

    Attributes:
        run_folder: the folder of this run; None before training starts.
        last_model_path: the newest checkpoint that is known to be complete, or "".
        scores: maps names of checkpoints to validation scores.
        failed_saves: number of checkpoints that could not be written.
        longest_save: duration of the slowest save of this run in seconds, until it was complete on disk; None before
            the first.

    Raises:
        ValueError: a number is less than 1, `mode` is unknown, or object storage cannot be used.
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
                raise ValueError(f"DCPCheckpoint({name}={value}): {name} must be at least 1, or None.")
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

    # --- existing checkpoints ---------------------------------------------------------------------------------------

    def find_last(self, default_root_dir: str | Path, whole: bool = False) -> Path | None:
        """The newest checkpoint of this and earlier runs; None if there is none.

        Args:
            default_root_dir: the Trainer's folder.
            whole: skip damaged checkpoints, with a warning for each.

        Raises:
            ValueError: without `whole`, the newest checkpoint in object storage is damaged.
        """
        base = self._base(default_root_dir)
        local = find_last(base, whole)
        return local if self.remote is None else download_last(self.remote, base, local, whole)

    def find_best(self, default_root_dir: str | Path) -> Path | None:
        """The best checkpoint of the newest run that has one; None if there is none."""
        base = self._base(default_root_dir)
        return find_best(base) if self.remote is None else download_best(self.remote, base)

    @property
    def best_model_path(self) -> str:
        """The best checkpoint of this run, or ""."""
        ranked = self._ranked()
        return str(self.run_folder / ranked[0]) if ranked and self.run_folder is not None else ""

    @property
    def best_model_score(self) -> float | None:
        """The validation score of the best checkpoint, or None."""
        ranked = self._ranked()
        return self.scores[ranked[0]] if ranked else None

    # --- Lightning's hooks --------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the hyperparameters can be saved.

        Raises:
            ValueError: a hyperparameter is of a type that a checkpoint cannot hold.
        """
        if stage != "fit":
            return
        owners = (pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        for owner in filter(None, owners):  # fail now, not at the first save
            encode(dict(owner.hparams), f"{type(owner).__name__}.hparams")
        self.run_folder, self.scores, self.last_model_path = None, {}, ""
        self._last_saved, self.failed_saves, self.longest_save = -1, 0, None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the random state, and continue in the run folder of the checkpoint."""
        if trainer.state.fn != "fit" or not trainer.ckpt_path:
            return
        self._rng = checkpoint.get(RNG_KEY)
        resumed = Path(trainer.ckpt_path).resolve()
        base = self._base(trainer.default_root_dir).absolute()
        if resumed.parent in [run.resolve() for run in runs(base)]:
            self.run_folder, self.last_model_path = resumed.parent, str(resumed)
            self._last_saved = checkpoint["global_step"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that checkpoints can be written, before any time is spent on training.

        Raises:
            ValueError: the folder, the space or the credentials do not allow it.
        """
        check_checkpoints(trainer, self._base(trainer.default_root_dir).absolute(), self.remote, self.keep_last)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the run folder, and complete a resume."""
        if self._rng is not None:
            continue_loops(trainer, self._rng)
            self._rng = None
        self._last_step = trainer.global_step
        self._trained_since, self._slow = time.monotonic(), False
        self._saver = BackgroundSaver() if self.async_save else None
        self._newest = Path(self.last_model_path) if self.last_model_path else None  # the one resumed from
        if self.run_folder is None:
            # Rank 0 decides for all: another rank might already see files that rank 0 has just written.
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
        """Save if a save is due."""
        due = self._is_due(trainer)
        self._last_step = trainer.global_step
        if due:
            self._validation_due |= validates_after(trainer)
            self._save(trainer, pl_module)
            self._validation_due = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if the validation score is among the best.

        Raises:
            ValueError: the monitored metric was not logged.
        """
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
        """Save the last step, wait for the save, and report failed saves."""
        self._settle()
        if self.save_at_end:
            self._save(trainer, pl_module)
        self._settle()
        if self._saver is not None:
            self._saver.close()
            self._saver = None
        if self.failed_saves:
            rank_zero_warn(
                f"{self.failed_saves} checkpoint(s) of this run could not be written. The last good one: "
                f"{self.last_model_path or 'none'}."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Wait a little for the save in flight: it may be the newest checkpoint of a failing run."""
        saver, self._saver = self._saver, None
        if saver is None or saver.in_flight is None:
            return
        folder = saver.in_flight
        try:
            if saver.wait(LAST_WAIT):
                self.last_model_path = str(folder)
            else:
                rank_zero_warn(f"{folder} was not written within {LAST_WAIT} s after the error, so it is given up.")
        except (CheckpointError, ValueError) as error:
            rank_zero_warn(f"The checkpoint that was being written is lost: {error}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the run's config.yaml, and a validation that is still to be done, to the checkpoint."""
        config = Path(trainer.default_root_dir) / "config.yaml"
        if config.is_file():
            checkpoint[CONFIG_KEY] = config.read_text()
        if self._validation_due:
            resume_with_validation(checkpoint["loops"]["fit_loop"])

    def state_dict(self) -> dict[str, Any]:
        """The scores, and what they are scores of."""
        return {"scores": dict(self.scores), "monitor": self.monitor, "mode": self.mode}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores of checkpoints that still exist, if the same metric is monitored."""
        if (state_dict["monitor"], state_dict["mode"]) == (self.monitor, self.mode) and self.run_folder is not None:
            there = {folder.name for folder in saved_in(self.run_folder)}
            self.scores = {name: score for name, score in state_dict["scores"].items() if name in there}

    # --- saving -----------------------------------------------------------------------------------------------------

    def request_save(self, trainer: pl.Trainer) -> None:
        """Save the step that has just run. Every rank must call this in `on_train_batch_end`."""
        self._requested = True
        # Look it up now: the caller may be about to switch validation off to stop the run.
        self._validation_due = validates_after(trainer)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        if self._requested:
            self._requested = False
            return True
        # With several optimizers, a batch may advance the step by more than one and skip a multiple.
        if self.every_n_steps and step // self.every_n_steps > self._last_step // self.every_n_steps:
            return True
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs and trainer.is_last_batch and epoch % self.every_n_epochs == 0:
            return True
        # Save the last step here, not in `on_train_end`: there Lightning's state says that the epoch is complete.
        last_epoch = trainer.is_last_batch and epoch == trainer.max_epochs
        stops = trainer.should_stop and step >= (trainer.min_steps or 0) and not trainer.min_epochs
        return self.save_at_end and (step == trainer.max_steps or last_epoch or stops)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Save the step unless it is saved already. An async save only begins here.

        Returns:
            False if the save failed.
        """
        assert self.run_folder is not None
        folder = self.run_folder / step_folder(trainer.global_step)
        if self._last_saved == trainer.global_step:
            self._tidy_if(folder, trainer)
            return True
        if callable(check := getattr(pl_module, "check_finite", None)):
            check()  # raises on a loss that is not finite, so that good checkpoints are not replaced by a broken state
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
        """Wait for the save in flight on all ranks, and record how it ended."""
        folder = None if self._saver is None else self._saver.in_flight
        if self._saver is None or folder is None:
            return
        try:
            self._saver.wait()
        except CheckpointError as error:
            self._report(folder, error)
            self.scores = {name: score for name, score in self.scores.items() if name != folder.name}
            self._last_saved = -1  # the step may be saved again
        else:
            self._note_time(self._saver.seconds)
            self.last_model_path = str(folder)

    def _note_time(self, seconds: float) -> None:
        self.longest_save = max(self.longest_save or 0.0, seconds)

    def _report_slow(self, folder: Path, waited: float) -> None:
        """Warn once if training waited longer for the disk than it trained since the previous save."""
        trained, self._trained_since = time.monotonic() - waited - self._trained_since, time.monotonic()
        if waited > max(SLOW, trained) and not self._slow:
            self._slow = True
            what = "the checkpoint before that of" if self._saver is not None else "the checkpoint of"
            hint = "" if self._saver is not None else ", or use async_save=True"
            rank_zero_warn(
                f"Training waited {waited:.1f} s for {what} step {step_of(folder)}, after {trained:.1f} s of training: "
                f"the disk is too slow to save this often. Save less often{hint}."
            )

    def _report(self, folder: Path, error: CheckpointError) -> None:
        self.failed_saves += 1
        rank_zero_warn(
            f"The checkpoint of step {step_of(folder)} could not be written: {error}. Training continues; the latest "
            f"checkpoint is still {self.last_model_path or 'none'}."
        )

    def _on_whole(self, folder: Path) -> None:
        """Called on rank 0 when a checkpoint is complete, in the thread that wrote it."""
        saver = self._saver  # `on_exception` may set it to None meanwhile
        with saver.lock if saver is not None else nullcontext():
            self._newest = folder
            self._tidy(folder)

    def _tidy_if(self, folder: Path, trainer: pl.Trainer) -> None:
        """Tidy again, because a saved checkpoint now has a score. If it is still being written, the thread does it."""
        with self._saver.lock if self._saver is not None else nullcontext():
            if trainer.is_global_zero and self._newest == folder:
                self._tidy(folder)
        if self._saver is None:
            trainer.strategy.barrier("DCPCheckpoint")

    def _tidy(self, newest: Path) -> None:
        """Update the links, then remove checkpoints that are no longer kept."""
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
        """Names of scored checkpoints, best first. Of equal ones, the earlier is first."""
        sign = 1 if self.mode == "min" else -1
        return sorted(self.scores, key=lambda name: (sign * self.scores[name], name))

    def _monitored(self, trainer: pl.Trainer) -> float:
        assert self.monitor is not None
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"DCPCheckpoint(monitor={self.monitor!r}): validation logged no such metric. Logged metrics: "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'none'}."
            )
        # All ranks must decide by the same value: a save is collective.
        return float(trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor])))

    def _base(self, default_root_dir: str | Path) -> Path:
        return self.dirpath or Path(default_root_dir) / "checkpoints"
