"""Tells transformers' Trainer (5.23.0), and TRL's, that a model is sharded already. Private names of transformers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from automodel_trainer.checkpoint.edited_weights import like
from automodel_trainer.distributed.mesh import ParallelDims


def mark_as_sharded(model: PreTrainedModel, dims: ParallelDims) -> None:
    """Mark a laid-out model as transformers marks the models that it has sharded itself.

    Its Trainer then neither moves nor wraps the model, counts the ranks that see the same rows, defers the reduction of
    gradients while they accumulate, and calls `save_pretrained` on every rank. None of it is saved with the config. It
    reads whole tensors into the model, so these are cut as the model is.

    Args:
        model: laid out over several ranks.
        dims: the sizes of its mesh.
    """
    marked: Any = model
    marked._is_distributed_loading_by_transformers = True
    marked._tp_size = dims.tp
    marked._fsdp_size = dims.dp_shard * dims.cp
    model.config.distributed_config = DistributedConfig(
        tp_size=dims.tp, fsdp_size=dims.dp_shard * dims.cp, dp_replicate_size=dims.dp_replicate
    )
    model.register_load_state_dict_pre_hook(_cut)


def _cut(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: cut whole tensors as the parameters are. Collective."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if prefix + name in state_dict:
            state_dict[prefix + name] = like(state_dict[prefix + name], parameter)
