"""The manifest of a checkpoint: its files with sizes and checksums, and the check that they are unchanged."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from automodel_trainer.checkpoint.clock import note, stamp
from automodel_trainer.checkpoint.record import CHECKSUM, Entry, entry_of, to_json, write_json
from automodel_trainer.models.files import INDEX_NAME, check_safetensors, weight_files
from automodel_trainer.models.sidecars import is_weight_file

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-\d+")  # users may copy a checkpoint to another name
_LARGEST_JSON = 1 << 30  # bytes; real state is a few megabytes
_KEYS = {"name": str, "created": float, "files": dict}
_READ_BY_LOADERS = (".json", ".py", ".jinja")


def write_manifest(folder: Path, files: Mapping[str, Entry], name: str) -> None:
    """Write the manifest of a checkpoint.

    Its format is `{"name", "created": seconds, "files": {path: {"size", "xxh3_128"}}, "xxh3_128"}`. The last checksum
    is that of the manifest's other content.

    Args:
        folder: the folder to write it into.
        files: maps paths in the folder to entries.
        name: final name of the checkpoint.
    """
    content = {"name": name, "created": stamp(), "files": dict(sorted(files.items()))}
    write_json(folder / MANIFEST, {**content, CHECKSUM: _own_checksum(content)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        ValueError: it is missing or damaged, or names a file outside the folder.
    """
    file = folder / MANIFEST
    try:
        manifest = read_json(file)
        content: dict[str, Any] = {key: kind(manifest[key]) for key, kind in _KEYS.items()}
        # Compare the text, too: JSON ignores some damage, such as changed white space or a repeated key.
        if manifest[CHECKSUM] != _own_checksum(content) or file.read_text() != to_json(manifest):
            raise ValueError("its content does not match its checksum")
        sizes = {name: (int(entry["size"]), str(entry[CHECKSUM])) for name, entry in content["files"].items()}
    except FileNotFoundError as error:
        raise ValueError(
            f"{file} is missing, so {folder} is not a complete checkpoint of this library. {_meant(folder)}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}. {OTHER}") from error
    if _STEP.fullmatch(folder.name) and _STEP.fullmatch(content["name"]) and content["name"] != folder.name:
        raise ValueError(f"{file} is damaged: it belongs to {content['name']}. {OTHER}")
    outside = [name for name in sizes if _leaves(name)]
    if outside:
        raise ValueError(f"{file} names files outside its folder: {outside}. Do not trust this checkpoint.")
    note(content["created"])
    return content


def only_manifest(folder: Path) -> bool:
    """Whether nothing else is here: several nodes without a shared folder wrote the checkpoint to object storage."""
    return folder.is_dir() and [path.name for path in folder.iterdir()] == [MANIFEST]


def check_checkpoint(folder: str | os.PathLike[str], *, contents: bool = True, part: int = 0, parts: int = 1) -> None:
    """Check that a checkpoint is unchanged: every file exists with its size and checksum, and there are no others.

    Args:
        folder: the checkpoint.
        contents: read the files and compare checksums. False: check only names, sizes and headers.
        part: index of the share of the files to read, so that several ranks can read one share each.
        parts: number of shares.

    Raises:
        ValueError: the folder or its manifest does not exist (a save did not end), a file is missing or damaged, may
            contain code (pickle), or was not written with the others. The message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a checkpoint: there is no such folder. Check the path.")
    files = read_manifest(folder)["files"]
    if only_manifest(folder):
        raise ValueError(
            f"{folder} has only its {MANIFEST}: nodes without a shared folder wrote it to object storage. Give its "
            "URL, or ckpt_path='last'."
        )
    for name, entry in files.items():
        _check_file(folder, name, entry)
    for name in _unlisted(folder, files):
        raise ValueError(
            f"{folder / name} was not written with the checkpoint, but a loader could read it. Remove it, or resume "
            "from another checkpoint."
        )
    if contents:
        _check_contents(folder, files, part, parts)
    if (folder / "model" / INDEX_NAME).is_file():
        weight_files(folder / "model")  # checks the index against the files


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is not JSON, or larger than any file that this library writes.
        FileNotFoundError: it does not exist.
    """
    size = file.stat().st_size
    if size > _LARGEST_JSON:
        raise ValueError(f"{file} has {size:,} bytes, more than any state that this library writes. {OTHER}")
    try:
        return json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply to be read. {OTHER}") from error
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{file} is damaged: {error}.") from error


@contextmanager
def damage_named(file: Path, *also: type[Exception]) -> Iterator[None]:
    """Turn errors inside this context into a ValueError that says that `file` is damaged.

    Args:
        file: the file whose content is read inside.
        also: exception types to convert besides the usual ones.

    Raises:
        ValueError: instead of the original error.
    """
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
        raise ValueError(f"{file} is damaged: its content is not that of a checkpoint ({error!r}). {OTHER}") from error


def _check_file(folder: Path, name: str, entry: Entry) -> None:
    file = folder / name
    if is_weight_file(file) and file.suffix not in (".safetensors", ".json"):
        raise ValueError(
            f"{file} may contain code (pickle), which a checkpoint never does. Do not trust this checkpoint."
        )
    if not file.is_file():
        raise ValueError(f"The checkpoint {folder} lacks {name}: it was removed, or not copied. {OTHER}")
    size = file.stat().st_size
    if size != entry["size"]:
        raise ValueError(f"{file} is damaged: it has {size:,} bytes, but {entry['size']:,} were written. {OTHER}")
    if file.suffix == ".safetensors":
        check_safetensors(file)


def _check_contents(folder: Path, files: Mapping[str, Entry], part: int, parts: int) -> None:
    # Largest files first, dealt out in turn, so that the shares are about equal.
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


def _meant(folder: Path) -> str:
    """What somebody who gave this folder as a checkpoint may have meant."""
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        given = "the model" if (folder / "config.json").is_file() else "LoRAConfig(adapter=…)"
        within = folder.parent if (folder.parent / MANIFEST).is_file() else None
        other = f"To resume give {within}." if within else f"To begin with its weights give it as {given}."
        return f"It is a model without training state. {other}"
    return checkpoints_within(folder) or OTHER


def checkpoints_within(folder: Path) -> str:
    """What to say of a folder that holds checkpoints and is none; "" if it holds none."""
    inside = [found for found in (folder / "latest", folder / "checkpoints" / "latest") if found.is_dir()]
    return f"It holds checkpoints: give one, such as {inside[0]}." if inside else ""


OTHER = (
    "Copy it again, or resume from another checkpoint (ckpt_path='last-whole' resumes from the newest complete one)."
)
