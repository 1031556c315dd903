"""Which of Lightning's hooks around a step a user has overridden. An objective runs its own step, and calls these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

# Of callbacks and modules. `on_train_batch_end` is called by Lightning; whoever has it may look at the loss.
OF_BOTH = ("on_after_backward", "on_before_zero_grad", "on_train_batch_end")
OF_MODULES = ("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step")
NEVER_CALLED = ("backward", "on_before_backward")
# Callbacks of Lightning whose `on_train_batch_end` does not look at the outputs: all but these.
_LOOKING = ("spike", "lambda_function")


class StepHooks:
    """The names of hooks that somebody has overridden.

    Args:
        module: whose class may override some.

    Raises:
        ValueError: it overrides one that an objective does not call.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        kind = type(module)
        self._module = {name for name in (*OF_BOTH, *OF_MODULES, *NEVER_CALLED) if _is_users(getattr(kind, name), name)}
        if never := sorted(self._module.intersection(NEVER_CALLED)):
            raise ValueError(
                f"{kind.__name__} overrides {' and '.join(never)}, which would never be called: a strategy runs the "
                "backward of each micro-batch. Override `loss`, or look at gradients in on_after_backward."
            )
        if _is_users(kind.training_step, "training_step"):
            self._module.add("on_train_batch_end")  # super().training_step gives it the loss
        self._known: tuple[tuple[int, ...], frozenset[str]] = ((), frozenset(self._module))

    def __call__(self, callbacks: Sequence[Callback]) -> frozenset[str]:
        """The hooks that the module or one of these callbacks has. The answer is kept for the same callbacks."""
        if self._known[0] != (same := tuple(map(id, callbacks))):
            found = set(self._module)
            for callback in callbacks:
                found |= {name for name in (*OF_BOTH, *NEVER_CALLED) if _is_users(getattr(callback, name, None), name)}
                if "on_before_backward" in found:
                    found.remove("on_before_backward")
                    rank_zero_warn(
                        f"on_before_backward of {type(callback).__name__} is not called: a strategy runs the backward "
                        "of each micro-batch of this module. Use on_after_backward."
                    )
            self._known = (same, frozenset(found))
        return self._known[1]


def _is_users(hook: Any, name: str) -> bool:
    place = str(getattr(hook, "__module__", ""))
    if hook is None or place.startswith(("automodel_trainer.", "lightning.pytorch.core.")):
        return False
    if getattr(hook, "__func__", hook) is getattr(Callback, name, None):
        return False
    of_lightning = place.startswith("lightning.pytorch.callbacks.")
    return not (of_lightning and name == "on_train_batch_end") or place.rpartition(".")[2] in _LOOKING
