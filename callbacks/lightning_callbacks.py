"""What callbacks of Lightning that freeze, prune, average or save weights need of a Trainer."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint, ModelPruning
from torch import nn

from automodel_trainer.models.stage_names import names_of_all_stages
from automodel_trainer.strategies import Objective
from automodel_trainer.strategies.base.averaging import AVERAGING

# They freeze, prune or copy in `setup`, which Lightning calls before `configure_model`.
WANT_A_MODEL = (BaseFinetuning, ModelPruning, *AVERAGING)


def support_callbacks(trainer: Any) -> None:
    """Put a `LightningCallbacks` before the first callback of a Trainer that needs it, if there is one.

    `ModelCheckpoint` is told that Lightning optimizes an objective. Otherwise it ignores `train_time_interval`, and
    warns that it saves the weights after the step, which is what it should do.
    """
    callbacks: list[Callback] = trainer.callbacks
    for callback in callbacks:
        if type(callback).on_train_batch_end is ModelCheckpoint.on_train_batch_end:
            callback.on_train_batch_end = partial(_save_after_step, callback)  # type: ignore[method-assign]
    first = next((i for i, callback in enumerate(callbacks) if isinstance(callback, WANT_A_MODEL)), None)
    if first is not None and not any(isinstance(callback, LightningCallbacks) for callback in callbacks):
        callbacks.insert(first, LightningCallbacks())


class _Automatic:
    """An objective, as a callback sees it that asks whether Lightning optimizes it."""

    automatic_optimization = True

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _save_after_step(callback: Any, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
    module: Any = _Automatic(pl_module) if isinstance(pl_module, Objective) else pl_module
    ModelCheckpoint.on_train_batch_end(callback, trainer, module, *args, **kwargs)


class LightningCallbacks(Callback):
    """Stands before such callbacks. It builds the model of an objective for those that want one in their `setup`.

    Beside `BaseFinetuning` it keeps in checkpoints which parameters are trained: what the callback has unfrozen would
    be frozen again in a run that goes on.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None  # of a run whose parameters a callback freezes and unfreezes
        self._trained: list[str] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Build the model of an objective. A user's own module is left to its own `configure_model`."""
        self._model = self._trained = None
        is_objective = isinstance(pl_module, Objective)
        if stage != "fit":
            return
        if is_objective:
            pl_module.configure_model()
        if any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks):
            self._model = pl_module.model if is_objective else pl_module

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Freeze and unfreeze as it was when the checkpoint was written."""
        if self._model is None or self._trained is None:
            return
        trained = set(self._trained)
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name in trained)

    def state_dict(self) -> dict[str, Any]:
        """The names of trained parameters, where a callback changes which they are. Collective over pipeline stages."""
        if self._model is None:
            return {}
        names = [name for name, parameter in self._model.named_parameters() if parameter.requires_grad]
        return {"trained": names_of_all_stages(self._model, names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `on_fit_start`."""
        self._trained = state_dict.get("trained")
