"""Finds a model's folder, and checks its weight files before any of them is read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
_WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.md",
    "*.py",
    "LICENSE*",
]
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors format's own limit


def resolve_folder(
    path_or_id: str | os.PathLike[str], revision: str | None = None, *, subfolder: str | None = None, **hub: Any
) -> Path:
    """The local folder of a model: the path itself, or the Hub repository `path_or_id`, downloaded.

    Args:
        path_or_id: a folder, or the id of a repository.
        revision: branch, tag or commit of the repository.
        subfolder: of the folder or repository that holds the model.
        hub: more options of `huggingface_hub.snapshot_download`: token, cache_dir, local_files_only, force_download.

    Raises:
        ValueError: there is no such folder, and no such repository can be reached.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        folder = folder / (subfolder or "")
        if not folder.is_dir():
            raise ValueError(f"{path_or_id} has no subfolder={subfolder!r}.")
        return folder
    patterns = [f"{subfolder}/{pattern}" for pattern in _WANTED] if subfolder else _WANTED
    try:
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=patterns, **hub)) / (
            subfolder or ""
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model={str(path_or_id)!r} is neither a folder here nor a Hub repository that can be reached. "
            f"Give a folder with config.json and safetensors, or an id such as 'org/name'. ({error})"
        ) from error


def floating_dtypes(file: Path) -> list[torch.dtype]:
    """The dtypes of the tensors in a safetensors file that weights can be computed in, in the order of the file."""
    found = (_DTYPES.get(part.get_dtype()) for part in slices_of([file]).values())
    return [dtype for dtype in found if dtype is not None]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to be whole.

    Raises:
        ValueError: there are no safetensors files, the index names a file that is missing or outside the folder, or a
            file is damaged. The message names it.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        files = _files_of_index(index)
    elif (folder / WEIGHTS_NAME).is_file():
        files = [folder / WEIGHTS_NAME]
    else:
        raise ValueError(_no_weights(folder))
    for file in files:
        check_safetensors(file)
    return files


class TensorSlice(Protocol):
    """A tensor in a safetensors file, as `safe_open(…).get_slice(name)` gives it."""

    def get_shape(self) -> list[int]:
        """The tensor's shape."""

    def get_dtype(self) -> str:
        """The name of its dtype in safetensors."""

    def __getitem__(self, index: Any) -> Tensor:
        """Read a part of it."""


class FileSlice:
    """A `TensorSlice` that opens its file for each read: some systems count mapped files as memory."""

    def __init__(self, file: Path, name: str, shape: list[int], dtype: str) -> None:
        self.file, self.name, self._shape, self._dtype = file, name, shape, dtype

    def get_shape(self) -> list[int]:
        """The tensor's shape."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """The name of its dtype in safetensors."""
        return self._dtype

    def __getitem__(self, index: Any) -> Tensor:
        with safe_open(self.file, framework="pt") as tensors:
            part: Tensor = tensors.get_slice(self.name)[index]
            return part


def slices_of(files: list[Path]) -> dict[str, FileSlice]:
    """Every tensor in safetensors files by name, in the order of the files. Only their headers are read."""
    found: dict[str, FileSlice] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.offset_keys():
                part = tensors.get_slice(name)
                found[name] = FileSlice(file, name, part.get_shape(), part.get_dtype())
    return found


def check_safetensors(file: Path) -> None:
    """Check the header and the length of a safetensors file, without reading its tensors.

    Raises:
        ValueError: the file is missing, truncated or not safetensors; the message names it.
    """
    if not file.is_file():
        raise ValueError(f"Weights file {file} is missing. Download or copy it again.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > min(size - 8, _HEADER_LIMIT):
            raise ValueError(_damaged(file, "its header is truncated"))
        try:
            header = json.loads(stream.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(_damaged(file, "its header cannot be read")) from error
        if not all(isinstance(end, int) for end in ends):
            raise ValueError(_damaged(file, "its header cannot be read"))
    expected = 8 + header_size + max(ends, default=0)
    if size != expected:
        raise ValueError(_damaged(file, f"it has {size:,} bytes, and by its header it should have {expected:,}"))
    try:
        with safe_open(file, framework="pt"):  # checks that shapes, dtypes and offsets agree; reads only the header
            pass
    except SafetensorError as error:
        raise ValueError(_damaged(file, str(error))) from error


def weight_fingerprint(folder: Path) -> str | None:
    """A hash that tells the weights in a folder from others; None if it has none.

    It is made of the size of every weight file and of samples of its bytes, so it costs no time on large models.
    """
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}".encode())
        with file.open("rb") as stream:
            for place in range(8):
                stream.seek(size * place // 8)
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()[:12]


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = sorted({str.__str__(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not a safetensors index: {error}. Download or copy it again.") from error
    outside = [name for name in names if Path(name).name != name or "\0" in name]
    if outside:
        raise ValueError(f"{index} names files outside its folder: {outside}. Do not trust this checkpoint.")
    return [index.parent / name for name in names]


def _no_weights(folder: Path) -> str:
    found = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf", ".h5", ".ckpt"})
    other = (
        f" There are {', '.join(found)}, which are not read (pickle can run code). Convert them: load the "
        "model with transformers' own class, and save it with save_pretrained."
        if found
        else ""
    )
    if (folder / "adapter_config.json").is_file():
        other = f" It is an adapter: give its base as the model, and lora={{'adapter': '{folder}'}}."
    return f"{folder} holds no weights: neither {WEIGHTS_NAME} nor {INDEX_NAME}.{other}"


def _damaged(file: Path, how: str) -> str:
    return f"Weights file {file} is damaged: {how}. Download or copy it again."
