"""What an adapter's base computed with while it was trained, where the base's own config.json says something else.

PEFT's format has no place for it: an adapter that was trained with stretched positions, say, is wrong on its base
without them. It lies beside the adapter as `config_overrides.json`, in the form of the option `config_overrides`.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from automodel_trainer.models.files import resolve_folder
from automodel_trainer.models.quantization_config import without_quantization
from automodel_trainer.models.sidecars import source_folder

CHANGES_NAME = "config_overrides.json"
# How weights are held, and sizes that follow from the adapter's own tensors.
_NOT_COMPUTED = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "vocab_size"}


def config_changes(model: nn.Module) -> dict[str, Any] | None:
    """The values of a model's config that are others in the config.json of the folder that it was read from.

    Empty if it was read from none, or is a part of what the folder holds. None if the folder is gone.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    config = model.config
    if (source := source_folder(model)) is None:
        return None if config.name_or_path else {}
    file = source / "config.json"
    if not file.is_file() or json.loads(file.read_text()).get("model_type") != config.model_type:
        return {}
    return _changes(_values(type(config).from_pretrained(source)), _values(config), set(config.sub_configs))


def read_changes(adapter: str | os.PathLike[str]) -> dict[str, Any]:
    """What the file beside an adapter says; empty if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    file = resolve_folder(adapter) / CHANGES_NAME
    if not file.is_file():
        return {}
    try:
        changes = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}. Copy or save the adapter again.") from error
    if not isinstance(changes, dict):
        raise ValueError(f"{file} holds a {type(changes).__name__}, not an object. Copy or save the adapter again.")
    return changes


def write_changes(changes: dict[str, Any] | None, folder: Path) -> None:
    """Write the file, or remove that of an older adapter if nothing was changed. None: say that nobody knows."""
    if changes is None:
        warnings.warn(
            f"The folder of the base model is gone, so {folder} does not say whether the config was changed "
            f"(config_overrides). If it was, write the changes into {folder / CHANGES_NAME}.",
            stacklevel=2,
        )
    elif changes:
        (folder / CHANGES_NAME).write_text(json.dumps(changes, indent=2, sort_keys=True) + "\n")
    else:
        (folder / CHANGES_NAME).unlink(missing_ok=True)


def unmet_changes(changes: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Those of `changes` that a config does not have."""
    values = _values(config)
    return {key: value for key, value in changes.items() if not _has(values.get(key), value)}


def as_arguments(changes: dict[str, Any]) -> str:
    """Changes as arguments of `from_pretrained`, for a message."""
    return ", ".join(f"{key}={value!r}" for key, value in sorted(changes.items()))


def _has(found: Any, wanted: Any) -> bool:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return all(_has(found.get(key), value) for key, value in wanted.items())
    return bool(found == wanted)


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    return without_quantization(json.loads(config.to_json_string(use_diff=False)))


def _changes(before: dict[str, Any], now: dict[str, Any], parts: set[str]) -> dict[str, Any]:
    changed = {k: v for k, v in now.items() if k not in _NOT_COMPUTED and (k not in before or before[k] != v)}
    for key in parts & changed.keys():  # a config in the config: name what differs in it
        if isinstance(before.get(key), dict) and isinstance(changed[key], dict):
            changed[key] = _changes(before[key], changed[key], set())
    return {key: value for key, value in changed.items() if key not in parts or value}
