"""ContinueRun: what a run goes on with from its checkpoint, and what of it has changed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from automodel_trainer.callbacks.continued_loops import new_data, place_in_epoch, place_of, refuse_other_batches
from automodel_trainer.callbacks.run_settings import Settings, module_settings, run_settings
from automodel_trainer.checkpoint.given import continued_schedule, given_options, given_schedule
from automodel_trainer.checkpoint.loader_place import begins_anew, why_forgotten
from automodel_trainer.checkpoint.option_groups import GroupOptions
from automodel_trainer.checkpoint.settings import ROWS, Change, Meaning, changes, computes_otherwise, refuse
from automodel_trainer.checkpoint.state import RUN_KEY, read_lightning_state
from automodel_trainer.checkpoint.weights import load_weights
from automodel_trainer.data.base import MicroBatchDataModule
from automodel_trainer.data.loader import MicroBatchLoader
from automodel_trainer.strategies import MeshStrategy


class ContinueRun(Callback):
    """Compares a resumed run with its checkpoint, setting by setting (`checkpoint/settings.py` has the list).

    What is taken over counts from the first resumed step on: options of the optimizer, the schedule and its length, and
    batch sizes. What is refused is refused before the model is built. The ledger prints what changed; without a ledger
    it is logged.

    Attributes:
        checkpoint: the checkpoint that the run goes on from; None for a new run.
        changes: what differs from it.
        step: its optimizer step.

    Raises:
        ValueError: the checkpoint cannot go on with a setting of this run. The message names all of them.
    """

    def __init__(self) -> None:
        self.checkpoint: Path | None = None
        self.changes: list[Change] = []
        self.step = 0
        self.resume = "all"
        self._settings: Settings = {}
        self._midway: tuple[int, bool] | None = None
        self._knows_rows = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare the settings, before anything is built or read."""
        self.checkpoint, self.changes, self.step, self._settings = None, [], 0, {}
        self._midway, self._knows_rows = None, False
        strategy = trainer.strategy
        if not isinstance(strategy, MeshStrategy):
            return
        strategy.on_read = strategy.on_optimizers_read = None
        if stage != "fit":
            _warn_of_another_model(getattr(trainer, "evaluated_path", None), pl_module)
            return
        # Rank 0's: what is given in memory may be other values on each rank (random weights, its part of the rows).
        self._settings = strategy.broadcast(run_settings(trainer, pl_module))
        self.resume = getattr(trainer, "resume", "all")
        path = getattr(trainer, "resumed_path", None)
        if not path:
            return
        if not (Path(path) / "trainer.json").is_file():  # a file of Lightning's
            strategy.on_read = self._note_place
            return
        self.checkpoint = Path(path)
        state = read_lightning_state(self.checkpoint)
        self.step = state.get("global_step", 0)
        then = state.get(RUN_KEY, {}).get("settings", {})
        self._knows_rows = ROWS in then and ROWS in self._settings
        self.changes = changes(then, self._settings)
        refuse(self.changes, self.resume, self.checkpoint)
        if self.resume == "weights":
            return
        asks_for_new_data = self.resume == "data" and self._has_new_data(trainer)
        self._plan(trainer, state, asks_for_new_data)
        strategy.on_read = partial(self._continue, trainer, asks_for_new_data)
        strategy.on_optimizers_read = partial(self._continue_schedules, trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the weights of a run that takes only these, and say what changed if no ledger will."""
        if self.checkpoint is None:
            return
        assert isinstance(trainer.strategy, MeshStrategy)
        if self.resume == "weights":
            load_weights(trainer.strategy.trained_module, self.checkpoint / "model")
            rank_zero_info(f"A new run begins with the weights of {self.checkpoint}.")
        told = any(getattr(callback, "tells_changes", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if not told and (rows := changed_rows(self.changes)):
            rank_zero_info("\n".join([f"Changed since {self.checkpoint}:", *(f"  {text}" for text in rows)]))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say that an epoch begins anew, if its loader does not know its place."""
        midway, self._midway = self._midway, None
        if midway is not None and (reason := why_forgotten(trainer.train_dataloader, midway[1])) is not None:
            rank_zero_warn(begins_anew(midway[0], reason))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record the settings, and what optimizers and schedules were given."""
        checkpoint[RUN_KEY] = {
            "settings": self._settings,
            "optimizers": [given_options(optimizer) for optimizer in trainer.optimizers],
            "schedules": [
                {"class": type(config.scheduler).__name__, "state": given_schedule(config.scheduler)}
                for config in trainer.lr_scheduler_configs
            ],
        }

    def _has_new_data(self, trainer: pl.Trainer) -> bool:
        """Whether the data is another than the checkpoint's, or nobody can tell.

        A run that was started with new data goes on with it when the same command starts it again.
        """
        known = self._knows_rows or isinstance(trainer.datamodule, MicroBatchDataModule)  # type: ignore[attr-defined]
        return not known or any(change.setting.meaning is Meaning.NEW_DATA for change in self.changes)

    def _plan(self, trainer: Any, state: dict[str, Any], asks_for_new_data: bool) -> None:
        """Tell the Trainer how many steps the run will have, which a changed batch size or new data changes."""
        per_epoch = trainer._steps_per_epoch() if hasattr(trainer, "planned_steps") else None
        if per_epoch is None:
            return
        loader = self._loader_at(trainer, state)
        if asks_for_new_data:
            trainer.extra_steps = self.step
        elif loader is not None:
            trainer.extra_steps = self.step - loader.batches_yielded - loader.epoch * per_epoch
        planned = trainer.planned_steps()
        if planned is not None and planned <= self.step:
            rank_zero_warn(
                f"{self.checkpoint} is of step {self.step}, and this run has {planned} steps in all: nothing is left "
                "to train. Raise max_steps or max_epochs to go on."
            )

    def _loader_at(self, trainer: pl.Trainer, state: dict[str, Any]) -> MicroBatchLoader | None:
        """A loader at the checkpoint's position; None for a stream, or for data that is none of this project's."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(datamodule, MicroBatchDataModule) or (self.resume == "data" and self._has_new_data(trainer)):
            return None
        saved = state.get(type(datamodule).__qualname__, {}).get("train_loader")
        loader = datamodule.build_train_loader()
        if saved is None or not isinstance(loader, MicroBatchLoader):
            return None
        loader.load_state_dict(saved)
        return loader

    def _continue(self, trainer: pl.Trainer, asks_for_new_data: bool, checkpoint: dict[str, Any]) -> None:
        """Change what Lightning is about to restore, so that it fits this run."""
        if asks_for_new_data:
            new_data(trainer, checkpoint)
            return
        loader = self._loader_at(trainer, checkpoint)
        if loader is not None:
            saved = checkpoint[type(trainer.datamodule).__qualname__]["train_loader"]  # type: ignore[attr-defined]
            place_in_epoch(checkpoint, loader, saved["batches_yielded"])
            return
        if any(change.name == "data.rows_per_batch" for change in self.changes):
            refuse_other_batches(checkpoint, self.checkpoint)
        self._note_place(checkpoint)

    def _note_place(self, checkpoint: dict[str, Any]) -> None:
        self._midway = place_of(checkpoint)

    def _continue_schedules(
        self, trainer: pl.Trainer, checkpoint: dict[str, Any], groups: list[list[GroupOptions]]
    ) -> None:
        """Change the state of the schedules that Lightning is about to restore. Optimizers have theirs already."""
        built = checkpoint.get(RUN_KEY, {}).get("schedules", [])
        saved = checkpoint.get("lr_schedulers", [])
        continued = []
        for number, config in enumerate(trainer.lr_scheduler_configs):
            optimizer: Any = config.scheduler.optimizer
            then = built[number] if number < len(built) else {}
            state = saved[number] if number < len(saved) else None
            if state is None or then.get("class", type(config.scheduler).__name__) != type(config.scheduler).__name__:
                # Another schedule: it stands where it would stand had it been there from the first step on.
                counted = self.step if config.interval == "step" else checkpoint.get("epoch", 0)
                state, then = {"last_epoch": counted // config.frequency}, {}
            had = groups[trainer.optimizers.index(optimizer)] if optimizer in trainer.optimizers else []
            options = [group.then for group in had if group.then is not None] or None
            rates = [group.saved.get("lr") for group in had] or None
            going_on = continued_schedule(config.scheduler, state, then.get("state", {}), optimizer, options, rates)
            continued.append(going_on)
        checkpoint["lr_schedulers"] = continued


def _warn_of_another_model(checkpoint: str | None, module: pl.LightningModule) -> None:
    """Say it if the weights of a checkpoint are evaluated in a model that computes something else with them."""
    if checkpoint is None or not (Path(checkpoint) / "trainer.json").is_file():
        return
    then = read_lightning_state(Path(checkpoint)).get(RUN_KEY, {}).get("settings", {})
    now, lora = module_settings(module), getattr(module, "lora", None)
    if lora is not None and lora.adapter is not None and Path(lora.adapter) == Path(checkpoint) / "model":
        now = {name: value for name, value in now.items() if not name.startswith("model.lora.")}  # the adapter decides
    if changed := computes_otherwise(changes(then, now)):
        lines = "\n".join(f"  {change}" for change in changed)
        rank_zero_warn(f"{checkpoint} was trained otherwise, so this is not the model that was trained:\n{lines}")


def changed_rows(changed: list[Change]) -> list[str]:
    """The table *checkpoint → this run*: a line of text for each setting that changed."""
    width = max((len(change.name) for change in changed), default=0)
    lines = []
    for change in changed:
        _, _, values = str(change).partition(" ")
        how = f"  ({change.setting.reason})" if change.setting.reason else ""
        lines.append(f"{change.name:<{width}}  {values}{how}")
    return lines
