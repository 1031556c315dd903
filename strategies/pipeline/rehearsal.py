"""Try a model out in pipeline stages, on a small copy and in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer.models.rehearsal import logits_of, rehearse
from automodel_trainer.models.small_copy import text_inputs
from automodel_trainer.strategies.pipeline.split import find_parts, split_model
from automodel_trainer.strategies.pipeline.stage import SplitModel, Turn


def check_stages(model: nn.Module) -> None:
    """Check that a model in stages gives the numbers of the whole.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(model, PreTrainedModel):
        return
    found = rehearse(model, "stages", _in_stages)
    if found is not None:
        raise ValueError(
            f"pp > 1 hands hidden states from stage to stage and nothing else, and a small copy of "
            f"{type(model).__name__} in stages of one layer {found}. Its layers may share more, or take and return "
            "something else. Use fsdp2, or tp."
        )


def _in_stages(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits of a model with one layer per stage."""
    parts = find_parts(model)
    layers = len(model.get_submodule(parts.layers))  # type: ignore[arg-type]
    split = split_model(model, parts, [1] * layers, range(layers))
    stages = SplitModel(model, split, torch.float32, whole=lambda inputs: None)
    passed: Any = None
    for stage in split.stages:
        passed = stages.run(Turn(stage, passed), lambda: model(**text_inputs(model, ids)))
    return logits_of(passed)
