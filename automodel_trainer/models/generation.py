"""What generating text takes beside a model: the prompt as tokens, and settings that fit the model."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


GENERATION_CONFIG = "generation_config.json"


def check_generation_config(model: PreTrainedModel, source: Path | None) -> None:
    """Refuse settings that transformers would not write when the model is saved.

    It writes what it has read as it is, valid or not. What was changed since must be valid.

    Args:
        model: the model.
        source: the folder that it came from.

    Raises:
        ValueError: they cannot be saved.
    """
    if not model.can_generate() or (source is not None and says_the_same(model, source)):
        return
    try:
        with TemporaryDirectory() as folder:
            model.generation_config.save_pretrained(folder)
    except ValueError as error:
        raise ValueError(
            f"The model's generation_config cannot be saved, so neither could the trained model: {error} Change it "
            "before training, for example model.generation_config.do_sample = True."
        ) from error


def write_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's settings of generation into a folder, unless the source's file lies there and says the same."""
    if model.can_generate() and not says_the_same(model, folder):
        model.generation_config.save_pretrained(folder)


def says_the_same(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the file of a folder has a model's settings, or the model has none beyond those that its config gives."""
    from transformers import GenerationConfig

    if not (folder / GENERATION_CONFIG).is_file():
        return False
    own = model.generation_config
    return own == GenerationConfig.from_model_config(model.config) or own == GenerationConfig.from_pretrained(folder)


def generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> GenerationConfig:
    """The model's own settings (its end tokens above all) with the user's choice of length and sampling."""
    config = copy.deepcopy(model.generation_config)
    draws = temperature > 0
    # Settings for drawing that stay behind in a greedy config only cause warnings.
    config.update(
        do_sample=draws,
        temperature=temperature if draws else None,
        top_p=top_p if draws else None,
        top_k=0 if draws else None,
        max_new_tokens=max_new_tokens,
        max_length=None,
        use_cache=True,
    )
    config.eos_token_id = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return config


def encode(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]]) -> Any:
    """Token ids and mask, ``[1, s]`` each; without a chat template the last message is continued as plain text."""
    if not tokenizer.chat_template:
        return tokenizer(conversation[-1]["content"], return_tensors="pt", return_token_type_ids=False)
    from automodel_trainer.nn.content_parts import in_parts, wants_parts  # brings all of transformers

    if wants_parts(tokenizer.get_chat_template(), tokenizer.special_tokens_map):
        conversation = [in_parts(message) for message in conversation]
    return tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
