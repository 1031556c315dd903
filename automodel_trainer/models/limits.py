"""What a model's sizes allow its input to be: token ids, and positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def vocabulary_size(config: PreTrainedConfig, model: PreTrainedModel | None = None) -> int | None:
    """The number of token ids that a model embeds; None if its config does not say, and there is no model to ask."""
    embedding = None
    if model is not None:
        with suppress(NotImplementedError, AttributeError):  # it names none, or another pipeline stage has it
            embedding = model.get_input_embeddings()
    size = getattr(embedding, "num_embeddings", None) or getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def position_limit(config: PreTrainedConfig) -> int | None:
    """The number of positions that a model has, learned or rotary; None: no limit. Scaled rotary ones count scaled.

    It applies to each document: positions restart at the next one of a packed row.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or getattr(text, "alibi", False):
        return None
    for rope in _ropes(text):
        original, factor = rope.get("original_max_position_embeddings") or limit, rope.get("factor") or 1.0
        limit = max(limit, int(original * factor))
    return limit


def is_rotary(config: PreTrainedConfig) -> bool:
    """Whether a model's positions are rotary, so that `max_position_embeddings` may be set to more."""
    return next(_ropes(config.get_text_config()), None) is not None


def _ropes(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """The rotary parameters: one set for all layers, or one for each kind of layer."""
    found = getattr(config, "rope_parameters", None)
    if isinstance(found, Mapping) and found:
        parts = [part for part in found.values() if isinstance(part, Mapping)]
        yield from parts or [found]
