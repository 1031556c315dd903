"""`load_from_checkpoint` of Lightning reads checkpoint folders too, once this module is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from automodel_trainer._lightning import read_more_in_load_from_checkpoint
from automodel_trainer.checkpoint.remote import RemoteRuns, fetch, is_remote, scratch
from automodel_trainer.checkpoint.state import read_whole


def _is_folder(path: Any) -> bool:
    if not isinstance(path, (str, os.PathLike)):
        return False  # an open file
    if not is_remote(path):
        return os.path.isdir(path)
    return not str(path).startswith("http") and RemoteRuns(str(path)).is_folder()


def _read(path: Any, map_location: Any) -> dict[str, Any]:
    """A checkpoint folder as Lightning expects a checkpoint; weights go to `map_location` if it is a device."""
    folder = fetch(str(path), scratch(str(path))) if is_remote(path) else Path(path)
    checkpoint = read_whole(folder)
    if isinstance(map_location, (str, torch.device)):
        state: dict[str, Tensor] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weight.to(map_location) for name, weight in state.items()}
    return checkpoint


read_more_in_load_from_checkpoint(_is_folder, _read)
