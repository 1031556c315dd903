"""How many ranks tensor parallel gets when nobody says."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedConfig

from automodel_trainer.strategies.tensor.plan import heads_of, tp_sizes

LARGEST = 8  # more ranks than one node's fast links join are rarely worth their traffic


def choose_tp(module: nn.Module | None, devices: int) -> int:
    """The largest number of ranks, up to 8, that divides `devices` (of a node) and all head counts of the model.

    Args:
        module: the LightningModule that is about to be trained.

    Raises:
        ValueError: the model cannot be told before it is built.
    """
    config = _config(module)
    if config is None:
        raise ValueError(
            "tp='auto' sizes itself by the model's heads, and this module's model is not known before it is built. "
            "Give the size: strategy='fsdp2_tp:tp=2', or FSDP2Strategy(tp=2)."
        )
    heads = heads_of(config)
    size = max(n for n in tp_sizes([devices, *heads.values()]) if n <= LARGEST)
    stated = ", ".join(f"{name}={count}" for name, count in heads.items())
    rank_zero_info(f"fsdp2_tp: tp={size}, of {devices} device(s) in a node and {stated}. tp=… overrides it.")
    return size


def _config(module: Any) -> PreTrainedConfig | None:
    """The config of what a LightningModule will train (`model_config`), or of a model that it holds."""
    stated = getattr(module, "model_config", None)
    held = module.modules() if isinstance(module, nn.Module) else ()
    found = [stated, *(getattr(m, "config", None) for m in held)]
    return next((config for config in found if isinstance(config, PreTrainedConfig)), None)
