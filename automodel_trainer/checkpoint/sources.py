"""Inputs and outputs of the command-line tools: checkpoints, model folders, adapters, and new folders."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from automodel_trainer.checkpoint import check_checkpoint
from automodel_trainer.checkpoint.manifest import checkpoints_within
from automodel_trainer.checkpoint.remote import fetch, is_remote
from automodel_trainer.checkpoint.weight_stream import progress
from automodel_trainer.checkpoint.writable import check_folder
from automodel_trainer.models.files import resolve_folder

_ADAPTER = "adapter_config.json"


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a training checkpoint of this library."""
    return (folder / "manifest.json").is_file() and (folder / "trainer.json").is_file()


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a LoRA adapter in PEFT's format."""
    return (folder / _ADAPTER).is_file()


def local_folder(source: str | os.PathLike[str]) -> Path:
    """A local folder for `source`. Hub repositories and checkpoints in object storage (`s3://…`) are downloaded.

    Raises:
        ValueError: `source` does not exist.
    """
    if not is_remote(source):
        return resolve_folder(source)
    place = Path(tempfile.gettempdir()) / "amt-downloads" / hashlib.sha256(str(source).encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    return fetch(str(source), place)


def model_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a model or adapter: the one inside a checkpoint, or `source` itself; see `local_folder`.

    Raises:
        ValueError: `source` does not exist, or is a damaged checkpoint. The message names the file.
    """
    folder = local_folder(source)
    if not is_checkpoint(folder):
        if not (folder / "config.json").is_file() and (hint := checkpoints_within(folder)):
            raise ValueError(f"{source} is neither a model nor a checkpoint. {hint}")
        return folder
    check_whole(folder)
    return folder / "model"


def check_whole(folder: Path) -> None:
    """Check a checkpoint with a progress bar, because every byte is read; see `check_checkpoint`.

    Raises:
        ValueError: the checkpoint is damaged. The message names the file.
    """
    check_checkpoint(folder, contents=False)
    files = [file for file in folder.rglob("*") if file.is_file()]
    total, parts = sum(file.stat().st_size for file in files), max(1, len(files) - 1)
    with progress("checking", total) as advance:
        for part in range(parts):
            check_checkpoint(folder, part=part, parts=parts)
            advance(total // parts)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`. It is renamed to `output` if the block succeeds, and removed if it fails.

    Raises:
        ValueError: `output` exists already, or cannot be made.
    """
    check_folder(output.parent, output.name)
    if output.exists():
        raise ValueError(f"{output} exists already: give a new folder, or remove it first.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        target = Path(scratch) / output.name
        target.mkdir()
        yield target
        if target.exists():  # the block may have moved it there itself
            target.rename(output)
