"""DCPCheckpoint: when to save (steps, epochs, best validation score, end), and which checkpoints to keep."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from automodel_trainer.callbacks._loggers import tell_loggers
from automodel_trainer.callbacks.check_writable import check_checkpoints
from automodel_trainer.callbacks.checkpoint_names import FolderNames
from automodel_trainer.callbacks.checkpoint_schedule import Schedule
from automodel_trainer.callbacks.resumed_loops import continue_loops, resume_with_validation, validates_after
from automodel_trainer.callbacks.run_folder import RunFolder
from automodel_trainer.checkpoint import CheckpointError, remove_checkpoint, save_checkpoint
from automodel_trainer.checkpoint.background import BackgroundSaver
from automodel_trainer.checkpoint.folder import link
from automodel_trainer.checkpoint.hyperparameters import warn_of_hyperparameters
from automodel_trainer.checkpoint.remote import local_root, mirror
from automodel_trainer.checkpoint.runs import (
    BEST,
    LATEST,
    described,
    new_run,
    runs,
    saved_in,
)
from automodel_trainer.checkpoint.state import CONFIG_KEY, RNG_KEY, RUN_FOLDER_KEY
from automodel_trainer.distributed.agreement import gather
from automodel_trainer.distributed.restarts import remember
from automodel_trainer.strategies import MeshStrategy

LAST_WAIT = 20.0  # seconds that a failing run waits for the save in flight
SLOW = 1.0  # seconds that training may wait for a save without a warning


class DCPCheckpoint(RunFolder):
    """Saves `<dirpath>/step-00000010`, and links `latest` and `best` to complete checkpoints.

    A checkpoint holds everything that training needs to continue as if it had never stopped. Its `model/` is a Hugging
    Face folder. It is written under a temporary name and renamed when it is complete, so after a crash the previous
    checkpoint is still the latest. If a save fails (for example, because the disk is full), training continues with a
    warning.

    A new run never writes into a folder that has checkpoints: it uses `checkpoints-v1`, `-v2`, … A resumed run
    continues in the folder that it was resumed from.

    The arguments of Lightning's ModelCheckpoint mean here what they mean there; some have a second name.

    Args:
        dirpath: the folder of the run; by default `<default_root_dir>/checkpoints`. It may be a URL of object storage
            (`s3://bucket/run`, `gs://…`), as `default_root_dir` may. Then checkpoints are written to a local folder and
            copied to the store, and copies are removed together with their originals.
        every_n_steps, every_n_train_steps: optimizer steps between saves.
        every_n_epochs: epochs between saves, each after the last step of an epoch. If nothing says when to save and
            nothing is monitored, it is 1.
        train_time_interval: time between saves.
        keep_last: number of newest checkpoints to keep; None keeps all. By default 3, or 1 with `save_top_k`.
        monitor: a logged metric. After each validation (without one: after each epoch) whose score is among the
            `keep_best` best, the step is saved.
        mode: whether a lower (`min`) or a higher (`max`) score is better.
        keep_best: number of best checkpoints to keep besides the newest ones; by default 1.
        save_top_k: the same, and with a monitor nothing else is saved or kept. -1 keeps all, 0 saves nothing. Without a
            monitor, 1 keeps the newest.
        save_last: True and "link" save the last step, and every step that is due whatever its score. The link `latest`
            points to the newest checkpoint in any case.
        save_at_end: save the last step; by default True, unless `save_top_k` is given without `save_last`.
        filename: names of checkpoints, with metrics in braces (`{epoch}-{val_loss:.2f}`); by default `step-00000010`.
        auto_insert_metric_name: write `val_loss=0.12` for `{val_loss:.2f}`.
        enable_version_counter: add `-v1` to a name that is taken; otherwise the older checkpoint is replaced.
        save_weights_only: save no optimizer state. Training cannot go on from such a checkpoint.
        save_on_exception: save when training fails. One device only: a save needs all ranks.
        save_on_train_epoch_end: read the score at the end of an epoch (True) or of a validation (False).
        verbose: say when a checkpoint is written.
        async_save: training waits only until weights and optimizer state are copied to host memory, which takes as
            much memory as this rank's share of the checkpoint. Files are written in the background, one save at a
            time. A failed write is reported with the next save, or at the end.

    Attributes:
        run_folder: the folder of this run; None before training starts.
        last_model_path: the newest checkpoint that is known to be complete, or "".
        scores: maps names of checkpoints to scores.
        current_score: the last score that was read, or None.
        failed_saves: number of checkpoints that could not be written.
        longest_save: duration of the slowest save of this run in seconds, until it was complete on disk; None before
            the first.

    Raises:
        ValueError: a value is not allowed, two arguments say different things, or object storage cannot be used.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        keep_last: int | Literal["default"] | None = "default",
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        keep_best: int | None = None,
        save_at_end: bool | None = None,
        async_save: bool = False,
        *,
        filename: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int | None = None,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        schedule = Schedule(
            every_n_steps=every_n_steps,
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            train_time_interval=train_time_interval,
            keep_last=keep_last,
            monitor=monitor,
            mode=mode,
            keep_best=keep_best,
            save_top_k=save_top_k,
            save_last=save_last,
            save_at_end=save_at_end,
            save_on_train_epoch_end=save_on_train_epoch_end,
        )
        super().__init__(dirpath, schedule)
        self.names = FolderNames(filename, auto_insert_metric_name, enable_version_counter)
        self.async_save, self.verbose = async_save, verbose
        self.save_weights_only, self.save_on_exception = save_weights_only, save_on_exception
        self.current_score: float | None = None
        self.failed_saves = 0
        self.longest_save: float | None = None
        self._requested = False
        self._deferred = False  # a save that was due waits for a score
        self._last_saved, self._last_name = -1, ""
        self._validation_due = False
        self._rng: dict[str, Any] | None = None
        self._evaluates = False  # the checkpoint that is being read is evaluated, and no run goes on from it
        self._saver: BackgroundSaver | None = None
        self._newest: Path | None = None
        self._mirror: Any = None
        self._trained_since, self._slow = 0.0, False

    # --- Lightning's hooks --------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a new run, and check that it can be saved.

        Raises:
            ValueError: the strategy writes no checkpoint folders, or `save_on_exception` is to work on several ranks.
        """
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, MeshStrategy):
            raise ValueError(
                f"DCPCheckpoint saves under this project's strategies, not under {type(trainer.strategy).__name__}. "
                "Use Lightning's ModelCheckpoint, or a strategy such as 'fsdp2'."
            )
        if self.save_on_exception and trainer.world_size > 1:
            raise ValueError(
                "DCPCheckpoint(save_on_exception=True) works on one device: a save needs all ranks, and an exception "
                "may come on one. Save often (every_n_steps) instead."
            )
        for owner in filter(None, (pl_module, trainer.datamodule)):  # type: ignore[attr-defined]
            warn_of_hyperparameters(owner)
        self.run_folder, self.scores, self.last_model_path = None, {}, ""
        self._last_saved, self._last_name, self.failed_saves, self.longest_save = -1, "", 0, None
        self.current_score, self._deferred = None, False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the random state, and continue in the run folder of the checkpoint."""
        self._evaluates = trainer.state.fn != "fit"
        if self._evaluates:
            return
        self._rng = checkpoint.get(RNG_KEY)
        if (there := checkpoint.get(RUN_FOLDER_KEY)) is not None:  # another replica group's
            self.run_folder, self.last_model_path = Path(there[0]), there[1]
            return
        if not trainer.ckpt_path:
            return
        resumed = Path(trainer.ckpt_path).resolve()
        base = self._base(trainer.default_root_dir).absolute()
        if resumed.parent in [run.resolve() for run in runs(base)]:
            self.run_folder, self.last_model_path = resumed.parent, str(resumed)
            self._last_saved, self._last_name = checkpoint["global_step"], resumed.name

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that checkpoints can be written, before any time is spent on training.

        Raises:
            ValueError: the folder, the space or the credentials do not allow it.
        """
        check_checkpoints(
            trainer,
            self._base(trainer.default_root_dir).absolute(),
            self._store(trainer.default_root_dir),
            self.schedule.keep_last,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the run folder, and complete a resume."""
        if self._rng is not None:
            continue_loops(trainer, self._rng)
            self._rng = None
        self.schedule.start(trainer)
        self._trained_since, self._slow = time.monotonic(), False
        self._saver = BackgroundSaver() if self.async_save else None
        self._newest = Path(self.last_model_path) if self.last_model_path else None  # the one resumed from
        if self.run_folder is None:
            # Rank 0 decides for all: another rank might already see files that rank 0 has just written.
            base = self._base(trainer.default_root_dir).absolute()
            remote = self._store(trainer.default_root_dir)
            taken = {run for run, _ in remote.newest()} if remote is not None and trainer.is_global_zero else ()
            self.run_folder = trainer.strategy.broadcast(new_run(base, taken) if trainer.is_global_zero else None)
        if trainer.is_global_zero:
            remember(self.run_folder)  # type: ignore[arg-type]
        remote = self._store(trainer.default_root_dir)
        if remote is not None and self.run_folder is not None:
            base_name = self._base(trainer.default_root_dir).name
            self._mirror = partial(mirror, remote, self.run_folder.name.removeprefix(base_name))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a save is due."""
        requested, self._requested = self._requested, False
        due = self.schedule.is_due(trainer, requested) and not self.schedule.nothing
        if not due or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.schedule.only_best and not requested:
            self._deferred = True
            if not self.schedule.waits_for_score(trainer):
                self._score(trainer, pl_module)
            return
        self._validation_due |= validates_after(trainer)
        self._save(trainer, pl_module)
        self._validation_due = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if the validation score is among the best.

        Raises:
            ValueError: the monitored metric was not logged.
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.schedule.scores_after_validation(trainer):
            self._score(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if the epoch's score is among the best, where no validation gives the score.

        Raises:
            ValueError: the monitored metric was not logged.
        """
        if not self.schedule.scores_after_validation(trainer):
            self._score(trainer, pl_module)

    def _score(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        deferred, self._deferred = self._deferred, False
        if self.monitor is None or self.schedule.nothing or not self.schedule.scores_now(trainer, deferred):
            return
        score = self._monitored(trainer)
        if math.isnan(score):
            return
        self.current_score = score
        name = self._name(trainer)
        others = {other: value for other, value in self.scores.items() if other != name}
        self.scores = {**others, name: score}
        if name not in self._ranked()[: self.schedule.keep_best] or not self._save(trainer, pl_module, name):
            self.scores = others

    def _name(self, trainer: pl.Trainer) -> str:
        """The name of this step's checkpoint, saved already or not. Collective with a `filename`."""
        assert self.run_folder is not None
        saved = self._last_saved == trainer.global_step
        return self._last_name if saved else self.names.name(trainer, self.run_folder)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step, wait for the save, and report failed saves."""
        self._settle(trainer)
        if self.schedule.save_at_end:
            self._save(trainer, pl_module)
        self._settle(trainer)
        if self._saver is not None:
            self._saver.close()
            self._saver = None
        if self.failed_saves:
            rank_zero_warn(
                f"{self.failed_saves} checkpoint(s) of this run could not be written. The last good one: "
                f"{self.last_model_path or 'none'}."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Wait a little for the save in flight: it may be the newest of a failing run. Save if that was asked for."""
        saver, self._saver = self._saver, None
        if self.save_on_exception and self.run_folder is not None and not trainer.sanity_checking:
            self._save(trainer, pl_module)
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
        """Add the run's config.yaml and folder, and a validation that is still to be done, to the checkpoint."""
        config = local_root(trainer.default_root_dir) / "config.yaml"
        if config.is_file():
            checkpoint[CONFIG_KEY] = config.read_text()
        if self.run_folder is not None:
            checkpoint[RUN_FOLDER_KEY] = str(self.run_folder), self.last_model_path
        if self._validation_due:
            resume_with_validation(checkpoint["loops"]["fit_loop"])

    def state_dict(self) -> dict[str, Any]:
        """The scores, and what they are scores of."""
        return {"scores": dict(self.scores), "monitor": self.monitor, "mode": self.mode}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores of checkpoints that still exist, if the same metric is monitored.

        An evaluation restores none: those of the run that has ended are newer than the checkpoint's.
        """
        if self._evaluates or self.run_folder is None:
            return
        if (state_dict["monitor"], state_dict["mode"]) == (self.monitor, self.mode):
            # Rank 0 decides for all: in object storage its node may have seen more of this run than others.
            there = gather({folder.name for folder in saved_in(self.run_folder)})[0]
            self.scores = {name: score for name, score in state_dict["scores"].items() if name in there}

    # --- saving -----------------------------------------------------------------------------------------------------

    def request_save(self, trainer: pl.Trainer) -> None:
        """Save the step that has just run. Every rank must call this in `on_train_batch_end`."""
        self._requested = True
        # Look it up now: the caller may be about to switch validation off to stop the run.
        self._validation_due = validates_after(trainer)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str | None = None) -> bool:
        """Save the step unless it is saved already. An async save only begins here.

        Args:
            trainer: the Trainer.
            pl_module: the module.
            name: the checkpoint's; None: make it.

        Returns:
            False if the save failed.
        """
        assert self.run_folder is not None
        folder = self.run_folder / (name or self._name(trainer))
        if self._last_saved == trainer.global_step:
            self._tidy_if(folder, trainer)
            return True
        if callable(check := getattr(pl_module, "check_finite", None)):
            check()  # raises on a loss that is not finite, so that good checkpoints are not replaced by a broken state
        assert isinstance(trainer.strategy, MeshStrategy)
        if not trainer.strategy.writes_checkpoints:  # another replica group does
            self._last_saved, self._last_name, self.last_model_path = trainer.global_step, folder.name, str(folder)
            return True
        begun = time.monotonic()
        self._settle(trainer)
        if self._saver is not None:
            self._report_slow(folder, time.monotonic() - begun)
        whole = partial(self._on_whole, folder) if trainer.is_global_zero else None
        try:
            save: Any = None
            if self._saver is not None:
                save = partial(self._saver.save, then=whole, mirror=self._mirror)
            elif self._mirror is not None:
                save = partial(save_checkpoint, mirror=self._mirror)
            trainer.save_checkpoint(folder, weights_only=self.save_weights_only, storage_options=save)
        except CheckpointError as error:
            self._report(folder, error)
            return False
        self._last_saved, self._last_name = trainer.global_step, folder.name
        if self._saver is None:
            self._note_time(time.monotonic() - begun)
            self._report_slow(folder, time.monotonic() - begun)
            self.last_model_path = str(folder)
            if whole is not None:
                whole()
            trainer.strategy.barrier("DCPCheckpoint")
            self._announce(trainer)
        return True

    def _announce(self, trainer: pl.Trainer) -> None:
        """Say that the newest checkpoint is complete, to loggers and, if that is wanted, to the user."""
        if trainer.is_global_zero:
            tell_loggers(trainer, self)
        if self.verbose:
            score = (
                ""
                if self.monitor is None or self.current_score is None
                else f", {self.monitor}={self.current_score:.5g}"
            )
            rank_zero_info(
                f"Epoch {trainer.current_epoch}, step {self._last_saved}{score}: saved {self.last_model_path}."
            )

    def _settle(self, trainer: pl.Trainer) -> None:
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
            self._announce(trainer)

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
                f"Training waited {waited:.1f} s for {what} {described(folder)}, after {trained:.1f} s of training: "
                f"the disk is too slow to save this often. Save less often{hint}."
            )

    def _report(self, folder: Path, error: CheckpointError) -> None:
        self.failed_saves += 1
        rank_zero_warn(
            f"The checkpoint of {described(folder)} could not be written: {error}. Training continues; the latest "
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
        best = self._ranked()[: self.schedule.keep_best]
        try:
            link(run / LATEST, newest.name)
            saved = saved_in(run)
            if best and run / best[0] in saved:
                link(run / BEST, best[0])
            keep = {newest.name, *best, *(folder.name for folder in saved[-(self.schedule.keep_last or len(saved)) :])}
            for folder in saved:
                if folder.name not in keep:
                    remove_checkpoint(folder)
            if self._mirror is not None:
                links = {LATEST: newest.name, **({BEST: best[0]} if best else {})}
                self._mirror.args[0].tidy(self._mirror.args[1], keep, links)
        except OSError as error:
            rank_zero_warn(f"{newest} is written, but links or old checkpoints in {run} could not be changed: {error}")

    def _monitored(self, trainer: pl.Trainer) -> float:
        assert self.monitor is not None
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"DCPCheckpoint(monitor={self.monitor!r}): validation logged no such metric. Logged metrics: "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'none'}."
            )
        # All ranks must decide by the same value: a save is collective.
        return float(trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor])))
