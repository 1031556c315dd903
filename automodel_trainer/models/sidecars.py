"""The files of a model folder other than weights: config, generation config, tokenizer, model card, license, …"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from automodel_trainer.models.auto_classes import auto_class_of, auto_classes_of
from automodel_trainer.models.generation import write_generation_config
from automodel_trainer.models.quantization_config import without_quantization
from automodel_trainer.models.record import record_of, recorded

# Weights in any format, and files that may run code when they are read (pickle).
_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".hdf5", ".ot",
    ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".tflite", ".mlmodel", ".nemo", ".engine", ".index", ".meta",
}  # fmt: skip
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_UNCHANGED = ("architectures", "transformers_version", "_name_or_path")  # config keys that training does not change


@dataclass(frozen=True)
class ModelFolder:
    """In a model's record: the folder that it was read from, and the name and revision that the user gave."""

    folder: Path
    name: str
    revision: str | None = None


def remember_folder(model: PreTrainedModel, folder: Path, name: str, revision: str | None = None) -> None:
    """Keep the folder that a model is read from, and give the model the name that the user gave: a Hub id, say."""
    record_of(model).keep(ModelFolder(folder, name, revision))
    model.config.name_or_path = model.name_or_path = name


def source_folder(model: PreTrainedModel) -> Path | None:
    """The local folder that a model came from, or None if it is gone. A Hub id is looked up in the local cache only."""
    name = getattr(model.config, "name_or_path", "") or getattr(model, "name_or_path", "")
    kept = recorded(model, ModelFolder)
    if kept is not None and kept.name == name and kept.folder.is_dir():
        return kept.folder
    if not name:
        return None
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), local_files_only=True))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
            return None
    return folder if (folder / "config.json").is_file() else None


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER)


def copy_sidecars(
    model: PreTrainedModel,
    folder: Path,
    *,
    source: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write everything but the weights into `folder`. Call it on one rank; it reads no parameter's values.

    Files of the folder that the model came from are copied unchanged (model card, license, tokenizer, chat template,
    code, and the generation config unless the user changed it). config.json keeps every field that training did not
    change, known to transformers or not. It says nothing of quantized weights, because those that are written are
    dense.

    Args:
        model: the trained model.
        folder: an existing folder.
        source: the folder that the model came from; by default the one that its config names. Without one, transformers
            writes the files.
        tokenizer: replaces the source's tokenizer if it differs.
        dtype: of the weights in `folder`; by default the model's.
    """
    source = source or source_folder(model)
    dtype = dtype or model.dtype
    if source is None:
        _save_config(model, folder, dtype)
    else:
        for file in _sidecars_of(source, folder):
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        (folder / "config.json").write_text(json.dumps(_merged_config(model, source, dtype), indent=2) + "\n")
    write_generation_config(model, folder)
    if tokenizer is not None and (source is None or not _same_tokenizer(tokenizer, source)):
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # of the tokenizer that is replaced
        tokenizer.save_pretrained(folder)


def is_weight_file(file: Path) -> bool:
    """Whether a file of a model folder holds weights or is their index."""
    return file.suffix.lower() in _WEIGHTS or file.name.endswith(".index.json")


def _sidecars_of(source: Path, folder: Path) -> list[Path]:
    """The files to copy: no weights, no hidden files (caches, version control), and nothing inside `folder` itself."""
    files = []
    for file in sorted(source.rglob("*")):
        parts = file.relative_to(source).parts
        if any(part.startswith(".") or part == "__pycache__" for part in parts) or not file.is_file():
            continue
        if not is_weight_file(file) and not file.resolve().is_relative_to(folder.resolve()):
            files.append(file)
    return files


def _save_config(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    config = _own_config(model, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _own_config(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
    config = without_quantization(json.loads(model.config.to_json_string()))
    return config | {"dtype": _name(dtype), "architectures": [_class_name(model)]}


def _merged_config(model: PreTrainedModel, source: Path, dtype: torch.dtype) -> dict[str, Any]:
    original = without_quantization(json.loads((source / "config.json").read_text()))
    if original.get("model_type") != model.config.model_type:  # a part of what the source holds: its text model, say
        return _own_config(model, dtype)
    config = type(model.config).from_pretrained(source)
    before = json.loads(config.to_json_string(use_diff=False))
    now = without_quantization(json.loads(model.config.to_json_string(use_diff=False)))
    now["dtype"] = _name(dtype)
    merged = _merge(original, before, now)
    purposes = auto_classes_of(model)
    if purposes and auto_class_of(config) not in purposes:
        merged["architectures"] = [_class_name(model)]  # another head than the one the weights came with
    return merged


def _merge(original: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """`original`, updated by the values that differ between `before` and `now`."""
    merged = dict(original)
    for key, value in now.items():
        if key in _UNCHANGED or (key in before and value == before[key]):
            continue
        known = merged.get(key)
        if isinstance(value, dict) and isinstance(known, dict):
            merged[key] = _merge(known, before.get(key) or {}, value)
        elif key == "dtype" and "torch_dtype" in merged:  # the older name of the field
            merged["torch_dtype"] = value
        else:
            merged[key] = value
    return merged


def _same_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Path) -> bool:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # a processor: it has more files than a tokenizer
        return False
    original = _original_identity(source)
    if original is None:
        return str(getattr(tokenizer, "name_or_path", "")) == str(source)
    return _identity(tokenizer) == original


@lru_cache(maxsize=2)
def _original_identity(source: Path) -> list[Any] | None:
    """What the tokenizer in a folder computes; None if there is none, or it needs code that is not trusted."""
    try:
        return _identity(AutoTokenizer.from_pretrained(source))
    except (OSError, ValueError, KeyError):
        return None


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What a tokenizer computes, to compare it with another. Padding and truncation of the last call do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return [rules, tokenizer.chat_template, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}]


def _class_name(model: PreTrainedModel) -> str:
    return type(model).__name__.removeprefix("FSDP")  # FSDP2 puts a class of its own before the model's


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
