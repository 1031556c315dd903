"""What a model's config says about quantized weights: find it, and take it out once the weights are dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONFIG_KEYS = ("quantization_config", "compression_config")  # the second is an older name


@dataclass(frozen=True)
class ReadDense:
    """In a model's record: its weights were codes and scales in the files, and are dense now.

    Args:
        method: how they were quantized, as the config of the checkpoint calls it.
    """

    method: str


def quantization_in(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` in a config, at its top or in the config of one of its parts."""
    for key in CONFIG_KEYS:
        if isinstance(config.get(key), dict) and config[key]:
            return dict(config[key])
    parts = (value for value in config.values() if isinstance(value, dict))
    return next((found for part in parts if (found := quantization_in(part))), None)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config (as JSON) that says nothing of quantization, nor do its parts."""
    kept = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    return {key: without_quantization(value) if isinstance(value, dict) else value for key, value in kept.items()}


def forget_quantization(config: Any) -> None:
    """Take what a `PreTrainedConfig` says about quantization out of it and out of its parts: the model is dense."""
    for key in CONFIG_KEYS:
        if getattr(config, key, None) is not None:
            delattr(config, key)
    for name in getattr(config, "sub_configs", None) or {}:
        if (part := getattr(config, name, None)) is not None:
            forget_quantization(part)
