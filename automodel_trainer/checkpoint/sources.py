"""What the tools are pointed at: a checkpoint, a model folder, an adapter; and what they write."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from automodel_trainer.checkpoint import check_checkpoint
from automodel_trainer.checkpoint.remote import fetch, is_remote
from automodel_trainer.checkpoint.weight_stream import progress
from automodel_trainer.models.files import resolve_folder

_ADAPTER = "adapter_config.json"


def is_checkpoint(folder: Path) -> bool:
    """Whether this library has written the folder to go on training from."""
    return (folder / "manifest.json").is_file() and (folder / "trainer.json").is_file()


def is_adapter(folder: Path) -> bool:
    """Whether it holds a LoRA adapter in PEFT's format."""
    return (folder / _ADAPTER).is_file()


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The folder itself, a Hub repository downloaded, or a checkpoint of object storage (`s3://…`) downloaded.

    Raises:
        ValueError: there is none.
    """
    if not is_remote(source):
        return resolve_folder(source)
    place = Path(tempfile.gettempdir()) / "amt-downloads" / hashlib.sha256(str(source).encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    return fetch(str(source), place)


def model_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of the model or adapter: inside a checkpoint, or `source` itself; see `local_folder`.

    Raises:
        ValueError: no such folder or repository, or a checkpoint that is not whole (what it lacks is named).
    """
    folder = local_folder(source)
    if not is_checkpoint(folder):
        return folder
    check_whole(folder)
    return folder / "model"


def check_whole(folder: Path) -> None:
    """`check_checkpoint`, with a progress bar: every byte is read.

    Raises:
        ValueError: the checkpoint is not what was written; what is wrong is named.
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
    """A temporary folder beside `output`, which becomes it when the block succeeds, and goes when it fails.

    Raises:
        ValueError: `output` is there already.
    """
    if output.exists():
        raise ValueError(f"{output} exists already: give a new folder, or remove it first.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        target = Path(scratch) / output.name
        target.mkdir()
        yield target
        if target.exists():  # the block may have moved it there itself
            target.rename(output)
