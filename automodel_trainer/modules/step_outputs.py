"""What a training step hands to `on_train_batch_end`: the loss, where somebody may ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback

# Callbacks that are known not to look at the outputs of a step. Of Lightning's, these two do.
_SILENT, _LOOKING = ("automodel_trainer.", "lightning.pytorch.callbacks."), ("spike", "lambda_function")


class LossWanted:
    """Whether a callback, or a module, may look at the loss of each step: its sum over ranks costs a small collective.

    Args:
        module: of this project, or a subclass of a user's.
    """

    def __init__(self, module: Any) -> None:
        self._module, self._known = _looks(type(module).on_train_batch_end), (-1, False)

    def __call__(self, callbacks: Sequence[Callback]) -> bool:
        """Whether one of these callbacks, or the module, may look. The answer is kept for as many callbacks."""
        if self._known[0] != len(callbacks):
            wanted = self._module or any(_looks(callback.on_train_batch_end) for callback in callbacks)
            self._known = (len(callbacks), wanted)
        return self._known[1]


def _looks(hook: Any) -> bool:
    if getattr(hook, "__func__", hook) in (Callback.on_train_batch_end,):
        return False
    place = str(getattr(hook, "__module__", ""))
    silent = place.startswith((*_SILENT, "lightning.pytorch.core."))
    return not silent or place.rpartition(".")[2] in _LOOKING
