"""Which objective a model is trained by that is given to `fit` as a path or an object."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from automodel_trainer.models.auto_classes import WITH_PICTURES, auto_class_of, auto_classes_of
from automodel_trainer.models.files import resolve_folder
from automodel_trainer.modules.causal_lm import CausalLMModule
from automodel_trainer.modules.hugging_face import HuggingFaceModule
from automodel_trainer.modules.image_text import ImageTextModule

DEFAULT_OBJECTIVE = CausalLMModule
"""The objective of a model of text."""


def objective_for(config: PreTrainedConfig) -> type[HuggingFaceModule]:
    """The objective of a model with this config."""
    return ImageTextModule if auto_class_of(config) == WITH_PICTURES else DEFAULT_OBJECTIVE


def objective_of(model: Any) -> type[HuggingFaceModule]:
    """The objective of a loaded model, perhaps with PEFT's adapters, by its class."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return ImageTextModule if WITH_PICTURES in auto_classes_of(base)[:1] else DEFAULT_OBJECTIVE


def objective_named(source: str | os.PathLike[str]) -> type[HuggingFaceModule]:
    """The objective of the model in a folder or Hub repository. The default where no config can be read."""
    try:
        return objective_for(AutoConfig.from_pretrained(resolve_folder(source)))
    except (OSError, ValueError, KeyError):  # none, damaged, or with code of its own: building the model says so
        return DEFAULT_OBJECTIVE
