"""Tells transformers' Trainer (5.23.0), and TRL's, that a model is sharded already. Private names of transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from automodel_trainer.checkpoint.edited_weights import like
from automodel_trainer.distributed.mesh import ParallelDims
from automodel_trainer.nn.text import listed


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
    # FSDP2 has put the model into a class of its own. By the name of the class the Trainer knows, for label smoothing,
    # whether labels are those of the next token.
    marked._get_name = partial(str, next(c.__name__ for c in type(model).__mro__ if not issubclass(c, FSDPModule)))
    model.config.distributed_config = DistributedConfig(
        tp_size=dims.tp, fsdp_size=dims.dp_shard * dims.cp, dp_replicate_size=dims.dp_replicate
    )
    model.register_load_state_dict_pre_hook(_cut)
    _refuse_later_parameters(model, dims.tp)


def _refuse_later_parameters(model: PreTrainedModel, tp: int) -> None:
    """Refuse to train parameters that are added to a sharded model, where they would be trained wrongly.

    transformers' Trainer averages their gradients over ranks, and a loop of one's own does not. PEFT's adapters take
    the shapes of shards, and no module fits layers that are cut.
    """
    known = {name for name, _ in model.named_parameters()}

    def check(module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        handle.remove()
        added = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in known}
        wrong = [
            name
            for name, parameter in added.items()
            if not isinstance(parameter, DTensor)
            and (tp > 1 or _is_of_peft(model, name) or not hasattr(parameter, "_replicated_grad_hook_registered"))
        ]
        if wrong:
            raise ValueError(
                f"{listed(wrong)} came into the model after it was sharded: their gradients would not be averaged over "
                "ranks, or they do not fit layers that are cut. For adapters give lora=LoRAConfig(…) to "
                "from_pretrained, instead of PEFT's get_peft_model or peft_config=; add other modules before the model "
                "is sharded, or train under fsdp2 with transformers' Trainer, which averages them."
            )

    decoder: nn.Module = model.base_model  # PEFT calls the model's `forward`, past its hooks
    handle = decoder.register_forward_pre_hook(check)


def _is_of_peft(model: nn.Module, name: str) -> bool:
    """Whether a parameter is that of one of PEFT's layers, which hold the layer that they adapt."""
    parts = name.split(".")
    return any(hasattr(model.get_submodule(".".join(parts[:end])), "base_layer") for end in range(1, len(parts)))


def _cut(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: cut whole tensors as the parameters are. Collective."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if prefix + name in state_dict:
            state_dict[prefix + name] = like(state_dict[prefix + name], parameter)
