"""The number of tensor-parallel ranks for tp="auto"."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedConfig

from automodel_trainer.strategies.tensor.plan import heads_of, tp_sizes

LARGEST = 8  # beyond the fast links of one node, tensor parallel is rarely worth its traffic


def choose_tp(module: nn.Module | None, devices: int) -> int:
    """The largest number of ranks, up to 8, that divides `devices` and all head counts of the model.

    Args:
        module: the LightningModule to train.
        devices: devices of a node that are left for tp.

    Raises:
        ValueError: the model's config is not known before the model is built.
    """
    config = _config(module)
    if config is None:
        raise ValueError(
            "tp='auto' depends on the model's heads, and this module's model is not known before it is built. Give a "
            "size: strategy='fsdp2_tp:tp=2', or FSDP2Strategy(tp=2)."
        )
    heads = heads_of(config)
    size = max(n for n in tp_sizes([devices, *heads.values()]) if n <= LARGEST)
    stated = ", ".join(f"{name}={count}" for name, count in heads.items())
    rank_zero_info(f"tp='auto': chose tp={size} for {devices} device(s) per node and {stated}. Set tp=… to override.")
    return size


def _config(module: Any) -> PreTrainedConfig | None:
    """The config of the model that a LightningModule will build (`model_config`) or already holds."""
    stated = getattr(module, "model_config", None)
    held = module.modules() if isinstance(module, nn.Module) else ()
    found = [stated, *(getattr(m, "config", None) for m in held)]
    return next((config for config in found if isinstance(config, PreTrainedConfig)), None)
