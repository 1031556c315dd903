"""Files as they are written: flushed to the disk, and noted with their size and checksum.

The checksum is XXH3 (128 bits, the package `xxhash`, which `datasets` brings along). It finds what disks, networks and
hands do to files, at the speed of memory: 22 GB/s on one core, where zlib's crc32 does 4 and SHA-256 does 2; and it
does not hold Python's lock meanwhile, so that a save in the background does not slow training down. It is no signature:
who can write a file can write its checksum, which is why nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from automodel_trainer.checkpoint.safetensors_stream import SafetensorsWriter

CHECKSUM = "xxh3_128"
Entry = dict[str, Any]
"""Of a file: `{"size": bytes, "xxh3_128": 32 hexadecimal digits}`."""
_READ_AT_ONCE = 1 << 24


class RecordedFile:
    """A file opened for writing. `entry` is what went into it, which need not be what a failing disk gives back.

    Closing flushes it to the disk (fsync).
    """

    def __init__(self, file: Path) -> None:
        self._stream = file.open("wb")
        self._hash = xxhash.xxh3_128()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> None:
        with self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())

    @property
    def entry(self) -> Entry:
        return {"size": self.size, CHECKSUM: self._hash.hexdigest()}


def write_text(file: Path, text: str) -> Entry:
    """Write a file and flush it to the disk."""
    stream = RecordedFile(file)
    try:
        stream.write(text.encode())
    finally:
        stream.close()
    return stream.entry


def write_json(file: Path, value: Any) -> Entry:
    """Write plain values as JSON; not a number is an error."""
    return write_text(file, to_json(value))


def to_json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False)


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Entry:
    """Write tensors one after the other: beside them no memory is taken but for one that is on a GPU.

    Raises:
        OSError: the file could not be written.
        ValueError: a dtype that the format does not have.
    """
    opened: list[RecordedFile] = []

    def stream(path: Path) -> RecordedFile:
        opened.append(RecordedFile(path))
        return opened[0]

    planned = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(file, planned, metadata, stream) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return opened[0].entry


def entry_of(file: Path) -> Entry:
    """Size and checksum of a file that is there, by reading it."""
    digest, size = xxhash.xxh3_128(), 0
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(_READ_AT_ONCE):
            digest.update(block)
            size += len(block)
    return {"size": size, CHECKSUM: digest.hexdigest()}


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
