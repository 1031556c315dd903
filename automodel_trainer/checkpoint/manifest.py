"""The list of a checkpoint's files with their sizes and checksums, and the check that they are what was written."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from automodel_trainer.checkpoint.record import CHECKSUM, Entry, entry_of, to_json, write_json
from automodel_trainer.models.files import INDEX_NAME, check_safetensors, weight_files
from automodel_trainer.models.sidecars import is_weight_file

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-\d+")  # a checkpoint of another name is somebody's copy
_LARGEST_JSON = 1 << 30  # bytes; state is megabytes at most
_KEYS = {"name": str, "created": float, "files": dict}
_READ_BY_LOADERS = (".json", ".py", ".jinja")


def write_manifest(folder: Path, files: Mapping[str, Entry], name: str) -> None:
    """Write `{"name", "created": seconds, "files": {path: {"size", "xxh3_128"}}, "xxh3_128": of all the rest}`."""
    content = {"name": name, "created": time.time(), "files": dict(sorted(files.items()))}
    write_json(folder / MANIFEST, {**content, CHECKSUM: _own_checksum(content)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing or damaged, or names a file outside of the folder.
    """
    file = folder / MANIFEST
    try:
        manifest = read_json(file)
        content: dict[str, Any] = {key: kind(manifest[key]) for key, kind in _KEYS.items()}
        if manifest[CHECKSUM] != _own_checksum(content) or file.read_text() != to_json(manifest):
            raise ValueError("its content does not match its checksum")
        sizes = {name: (int(entry["size"]), str(entry[CHECKSUM])) for name, entry in content["files"].items()}
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing, so {folder} is no whole checkpoint of this library. {OTHER}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}. {OTHER}") from error
    if _STEP.fullmatch(folder.name) and _STEP.fullmatch(content["name"]) and content["name"] != folder.name:
        raise ValueError(f"{file} is damaged: it is that of {content['name']}. {OTHER}")
    outside = [name for name in sizes if _leaves(name)]
    if outside:
        raise ValueError(f"{file} names files outside its folder: {outside}. It is not to be trusted.")
    return content


def check_checkpoint(folder: str | os.PathLike[str], *, contents: bool = True, part: int = 0, parts: int = 1) -> None:
    """Check that a checkpoint is what was written: every file there, of its length, with its checksum, and no other.

    Args:
        folder: the checkpoint.
        contents: read the files and compare checksums; False looks at names, lengths and headers only.
        part: which share of the files to read, where several ranks read one each.
        parts: how many shares there are.

    Raises:
        ValueError: no such folder, no manifest (a save that did not end), a missing or damaged file, a file that may
            hold code (pickle), or one that was not written with the others; always by name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a checkpoint: there is no such folder.")
    files = read_manifest(folder)["files"]
    for name, entry in files.items():
        _check_file(folder, name, entry)
    for name in _unlisted(folder, files):
        raise ValueError(
            f"{folder / name} was not written with the checkpoint, and a loader could take it for a part of it. "
            "Remove it, or resume from another checkpoint."
        )
    if contents:
        _check_contents(folder, files, part, parts)
    if (folder / "model" / INDEX_NAME).is_file():
        weight_files(folder / "model")


def read_json(file: Path) -> Any:
    """A JSON file's content.

    Raises:
        ValueError: it is not JSON, or larger than any that is written here.
        FileNotFoundError: there is none.
    """
    size = file.stat().st_size
    if size > _LARGEST_JSON:
        raise ValueError(f"{file} has {size:,} bytes: more than any state that is written here.")
    try:
        return json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply to be read.") from error
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{file} is damaged: {error}.") from error


@contextmanager
def damage_named(file: Path, *also: type[Exception]) -> Iterator[None]:
    """What fails in here (of the usual kinds, and `also`) fails because `file` does not hold what it should: a
    ValueError that names it."""
    kinds: tuple[type[Exception], ...] = (
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RuntimeError,
        *also,
    )
    try:
        yield
    except kinds as error:
        raise ValueError(f"{file} is damaged: it does not hold what a checkpoint does ({error!r}). {OTHER}") from error


def _check_file(folder: Path, name: str, entry: Entry) -> None:
    file = folder / name
    if is_weight_file(file) and file.suffix not in (".safetensors", ".json"):
        raise ValueError(f"{file} may hold code (pickle), which a checkpoint never does: it is not to be trusted.")
    if not file.is_file():
        raise ValueError(f"The checkpoint {folder} lacks {name}: it was removed, or not copied. {OTHER}")
    size = file.stat().st_size
    if size != entry["size"]:
        raise ValueError(f"{file} is damaged: it has {size:,} bytes where {entry['size']:,} were written. {OTHER}")
    if file.suffix == ".safetensors":
        check_safetensors(file)


def _check_contents(folder: Path, files: Mapping[str, Entry], part: int, parts: int) -> None:
    by_size = sorted(files, key=lambda name: (-files[name]["size"], name))
    for name in by_size[part::parts]:
        if entry_of(folder / name)[CHECKSUM] != files[name][CHECKSUM]:
            raise ValueError(f"{folder / name} is damaged: its content is not what was written (checksum). {OTHER}")


def _unlisted(folder: Path, files: Mapping[str, Entry]) -> Iterator[str]:
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if name in files or name == MANIFEST or not file.is_file():
            continue
        if is_weight_file(file) or file.suffix in _READ_BY_LOADERS:
            yield name


def _leaves(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name


def _own_checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


OTHER = (
    "Copy it again, or resume from another checkpoint (ckpt_path='last-whole' goes on from the newest that is whole)."
)
