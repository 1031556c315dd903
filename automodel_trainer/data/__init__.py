"""Data modules for chats, pictures with text, raw text and random tokens.

A batch is the list of micro-batches of one optimizer step.

Start with `base.py` (what all data modules share) and `batches.py` (the tensors of a micro-batch).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from automodel_trainer.data.base import MicroBatchDataModule
    from automodel_trainer.data.chat import ChatDataModule
    from automodel_trainer.data.image_text import ImageTextDataModule
    from automodel_trainer.data.mock import MockDataModule
    from automodel_trainer.data.text import TextDataModule
    from automodel_trainer.data.tokenized import TokenDataModule

__all__ = [
    "ChatDataModule",
    "ImageTextDataModule",
    "MicroBatchDataModule",
    "MockDataModule",
    "TextDataModule",
    "TokenDataModule",
]

_HOME = {
    "ChatDataModule": "chat",
    "ImageTextDataModule": "image_text",
    "MicroBatchDataModule": "base",
    "MockDataModule": "mock",
    "TextDataModule": "text",
    "TokenDataModule": "tokenized",
}


def __getattr__(name: str) -> Any:
    # Import each class on first use: datasets and transformers take seconds to import.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
