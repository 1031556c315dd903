"""The purposes of models: transformers' auto classes, and PEFT's name for each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as names


@dataclass(frozen=True)
class Purpose:
    """The purpose of one auto class.

    Args:
        models: the model class for each model type, or several if transformers lists several.
        peft_task: PEFT's `task_type`.
    """

    models: Mapping[str, Any]
    peft_task: str

    def holds(self, class_name: str) -> bool:
        """Whether the auto class builds a model class of this name."""
        return any(class_name in ([listed] if isinstance(listed, str) else listed) for listed in self.models.values())


# The first that builds a class is taken: some classes are listed for text alone too, and would lose their pictures.
PURPOSES = {
    "AutoModelForImageTextToText": Purpose(names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "CAUSAL_LM"),
    "AutoModelForCausalLM": Purpose(names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "CAUSAL_LM"),
    "AutoModelForTokenClassification": Purpose(names.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "TOKEN_CLS"),
    "AutoModelForSequenceClassification": Purpose(names.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "SEQ_CLS"),
    "AutoModelForQuestionAnswering": Purpose(names.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, "QUESTION_ANS"),
    "AutoModelForSeq2SeqLM": Purpose(names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "SEQ_2_SEQ_LM"),
}
ASSUMED = "AutoModelForCausalLM"  # if a folder does not say what its model is for
WITH_PICTURES = "AutoModelForImageTextToText"
CLASSIFIERS = ("AutoModelForTokenClassification", "AutoModelForSequenceClassification")  # integer labels are classes
# Of auto classes that no objective here uses, for messages.
_OTHERS = {
    "AutoModelForMaskedLM": names.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}


_HEADS_IN_CHECKPOINTS = re.compile(r"(LM|LMHead|ToText|Seq2Seq|PreTraining)$")


def may_bring_a_head(auto_class: str) -> bool:
    """Whether an auto class gives the body of a checkpoint a new head (or none), as classifiers do.

    The heads of language models are in their checkpoints.
    """
    return _HEADS_IN_CHECKPOINTS.search(auto_class) is None


def transformers_class(auto_class: str) -> Any:
    """transformers' own auto class of this name.

    Raises:
        ValueError: transformers has none.
    """
    found = getattr(transformers, auto_class, None) if auto_class.startswith("AutoModel") else None
    if found is None:
        raise ValueError(
            f"auto_class={auto_class!r} is not an auto class of transformers. Give the name of one, for example "
            f"{', '.join(PURPOSES)}."
        )
    return found


def auto_classes_of(model: nn.Module) -> list[str]:
    """The auto classes that build models of this kind. Empty for a class that transformers does not list."""
    return _named(base.__name__ for base in type(model).__mro__)  # sharding subclasses the model's class


def auto_class_of(config: PreTrainedConfig) -> str:
    """The auto class that builds the model of a saved config, by its `architectures` and `auto_map`.

    A config without either is of a vision-language model if it has a tower and transformers lists its type so.
    """
    custom = [name for name in getattr(config, "auto_map", None) or {} if name in PURPOSES]
    named = [*_named(getattr(config, "architectures", None) or ()), *custom]
    sees = getattr(config, "vision_config", None) is not None
    if not named and sees and config.model_type in PURPOSES[WITH_PICTURES].models:
        return WITH_PICTURES
    return next(iter(named), ASSUMED)


def auto_class_of_folder(folder: str | os.PathLike[str], **options: Any) -> str:
    """The auto class for a model's folder or Hub id. `options` are those of `AutoConfig.from_pretrained`."""
    return auto_class_of(AutoConfig.from_pretrained(folder, **options))


def auto_class_that_builds(class_name: str) -> str | None:
    """The auto class that builds models of this class, also one that no objective here uses."""
    others = (auto for auto, models in _OTHERS.items() if Purpose(models, "").holds(class_name))
    return next(iter([*_named([class_name]), *others]), None)


def peft_task(model: nn.Module) -> str | None:
    """PEFT's `task_type` of a model. None, which PEFT allows, if its purpose is unknown."""
    found = auto_classes_of(model)
    if not found and isinstance(model, PreTrainedModel) and model.can_generate():
        found = [ASSUMED]
    return PURPOSES[found[0]].peft_task if found else None


def auto_class_of_task(task: str | None, config: PreTrainedConfig | None = None) -> str | None:
    """The auto class for PEFT's `task_type`; None if there is none.

    Args:
        task: PEFT's name. It is the same for models of text and those with pictures.
        config: of the base model. Its own auto class is taken if it has that task.
    """
    fitting = [name for name, purpose in PURPOSES.items() if purpose.peft_task == task]
    own = None if config is None else auto_class_of(config)
    return own if own in fitting else next((name for name in fitting if name != WITH_PICTURES), None)


def _named(class_names: Iterable[str]) -> list[str]:
    wanted = list(class_names)
    return [auto for auto, purpose in PURPOSES.items() if any(purpose.holds(name) for name in wanted)]
