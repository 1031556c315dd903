"""The processor of a vision-language model: its tokenizer, and what makes tensors of pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoProcessor
from transformers.processing_utils import ProcessorMixin

from automodel_trainer.models.files import resolve_folder

_FILES = ("processor_config.json", "preprocessor_config.json")


def has_processor(folder: Path) -> bool:
    """Whether a model's folder holds a processor for pictures."""
    return any((folder / name).is_file() for name in _FILES)


def load_processor(source: str | os.PathLike[str], trust_remote_code: bool = False) -> ProcessorMixin:
    """The processor of a folder or Hub id.

    Raises:
        ValueError: there is none for pictures, or it needs a package that is not installed.
    """
    folder = resolve_folder(source)
    if not has_processor(folder):
        raise ValueError(
            f"{folder} holds no processor ({' or '.join(_FILES)}), which makes the model's inputs of pictures. Copy "
            "these files from the model that it came from, or give processor=, a folder or Hub id."
        )
    try:
        processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise ValueError(
            f"The processor of {folder} needs a package that is not installed: {str(error).strip()}"
        ) from error
    return check_processor(processor, str(folder))


def check_processor(processor: Any, where: str) -> ProcessorMixin:
    """`processor`, which must have a tokenizer and take pictures. The tokenizer gets the chat template.

    Raises:
        ValueError: it does not.
    """
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ValueError(
            f"{where} gives a {type(processor).__name__}, which does not make inputs of text and pictures. Give the "
            "processor of a vision-language model: a ProcessorMixin with an image_processor and a tokenizer."
        )
    if processor.tokenizer.chat_template is None and processor.chat_template is not None:
        processor.tokenizer.chat_template = processor.chat_template
    return processor
