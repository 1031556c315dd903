"""Data with pictures for a small model: small pictures, short rows."""

from __future__ import annotations

from typing import Any

from automodel_trainer.data.image_text import ImageTextDataModule
from automodel_trainer.modules import HuggingFaceModule, ImageTextModule

PIXELS = 112 * 112
"""Of a picture, at most. Processors that scale every picture to one size do so with small ones too."""
LENGTH = 512
"""Tokens of a row, at most, unless pictures have more."""


def with_small_pictures(module: HuggingFaceModule, data: Any) -> Any:
    """A copy of a data module with pictures whose rows are short; other data as they are."""
    if not isinstance(data, ImageTextDataModule) or not isinstance(module, ImageTextModule):
        return data
    data = data.resized(PIXELS)
    if data.processor is None:
        data.processor = module.processor
    data.load_tokenizer()
    data.rope_index = module.rope_index
    found = module.isolation
    data.choose_packing(None if found.packed is not None else found.packed_obstacle)
    data.seq_len = min(data.seq_len, max(LENGTH, 2 * len(data.blank.input_ids)))
    data.micro_batch_size = 1
    return data
