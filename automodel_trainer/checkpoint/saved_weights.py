"""The weights of a checkpoint as a mapping: what `on_load_checkpoint` hooks see, and what is loaded after they ran."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from automodel_trainer.checkpoint.edited_weights import like
from automodel_trainer.checkpoint.weight_stream import Weights
from automodel_trainer.checkpoint.weights import load_weights
from automodel_trainer.models.lora import lora_of
from automodel_trainer.models.lora.adapter_files import is_adapter, read_tensors


class SavedWeights(MutableMapping[str, Tensor]):
    """The weights in a checkpoint by name. A tensor is read when it is asked for, whole, on the CPU.

    A checkpoint of adapters has them by PEFT's names without their prefix, and nothing of the base model.

    Args:
        folder: the `model/` folder of a checkpoint.

    Attributes:
        changed: whether an entry was set or removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changed = False
        self._files: Weights | None = None
        self._entries: dict[str, Tensor | None] | None = None  # None: still in the file

    def _known(self) -> dict[str, Tensor | None]:
        if self._entries is None:
            if is_adapter(self.folder):
                self._entries = dict(read_tensors(self.folder))
            else:
                self._files = Weights(self.folder)
                self._entries = dict.fromkeys(self._files.header)
        return self._entries

    def __getitem__(self, name: str) -> Tensor:
        value = self._known()[name]
        if value is not None:
            return value
        assert self._files is not None
        return self._files.read([name])[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._known()[name] = value
        self.changed = True

    def __delitem__(self, name: str) -> None:
        del self._known()[name]
        self.changed = True

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def __deepcopy__(self, memo: Any) -> dict[str, Tensor]:
        return dict(self.items())

    def copy(self) -> dict[str, Tensor]:
        """All weights, read into memory."""
        return dict(self.items())


def load_state(module: nn.Module, state: Mapping[str, Any], strict: bool, whole: bool) -> None:
    """Load weights into a module in place. Collective.

    Args:
        module: the module, on its layout.
        state: a checkpoint's weights, changed by hooks or not, or any state dict.
        strict: whether names must be the same. Otherwise what is missing keeps its value.
        whole: the module holds whole tensors, and its own `load_state_dict` is to be called.

    Raises:
        ValueError: names or shapes do not fit.
    """
    unchanged = isinstance(state, SavedWeights) and not state.changed
    if unchanged and not whole:
        load_weights(module, state.folder, strict)  # type: ignore[attr-defined]  # each rank reads its own shards
        return
    if lora_of(module) is not None:
        raise ValueError(
            "on_load_checkpoint changed the weights of a checkpoint of adapters, or the file is no folder of this "
            "project. Adapters are loaded as they were saved: leave checkpoint['state_dict'] as it is."
        )
    target: Mapping[str, Any] = module.state_dict()
    values = {name: like(value, target.get(name)) for name, value in _with_aliases(module, dict(state)).items()}
    try:
        module.load_state_dict(values, strict=strict)
    except RuntimeError as error:
        raise ValueError(f"The checkpoint does not fit {type(module).__name__}: {error}") from error


@torch.no_grad()
def _with_aliases(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Add the names of tied tensors: a checkpoint holds a tied tensor once."""
    names: dict[int, list[str]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    for tied in names.values():
        present = next((name for name in tied if name in state), None)
        if present is not None:
            for name in tied:
                state.setdefault(name, state[present])
    return state
