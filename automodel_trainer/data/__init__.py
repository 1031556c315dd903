"""Data modules: chats, raw text and random tokens, as lists of micro-batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from automodel_trainer.data.base import MicroBatchDataModule
    from automodel_trainer.data.chat import ChatDataModule
    from automodel_trainer.data.mock import MockDataModule
    from automodel_trainer.data.text import TextDataModule

__all__ = ["ChatDataModule", "MicroBatchDataModule", "MockDataModule", "TextDataModule"]

_HOME = {"ChatDataModule": "chat", "MicroBatchDataModule": "base", "MockDataModule": "mock", "TextDataModule": "text"}


def __getattr__(name: str) -> Any:
    # Each is imported when it is asked for: they bring datasets and transformers along, which take seconds.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
