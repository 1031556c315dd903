"""Write a safetensors file one tensor at a time. The header is written first, from the planned dtypes and shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.complex64: "C64",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class SafetensorsWriter:
    """A context manager that writes a safetensors file. Call `write` for the tensors in the order of `planned`.

    Args:
        file: the file to write.
        planned: maps the name of every tensor to (dtype, shape).
        metadata: strings to store besides the tensors.
        stream: opens the file for writing. It must return an object with `write` and `close`.

    Raises:
        ValueError: safetensors does not support a dtype (raised on entry).
    """

    def __init__(
        self,
        file: Path,
        planned: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        stream: Callable[[Path], Any] | None = None,
    ) -> None:
        self.file, self.planned = file, dict(planned)
        self.metadata = {"format": "pt", **(metadata or {})}
        self._open = stream or (lambda path: path.open("wb"))
        self._waiting = list(self.planned)

    def __enter__(self) -> SafetensorsWriter:
        header: dict[str, object] = {"__metadata__": self.metadata}
        offset = 0
        for name, (dtype, shape) in self.planned.items():
            if dtype not in _NAMES:
                raise ValueError(f"{name} is of {dtype}, which safetensors cannot hold: cast it to another dtype.")
            end = offset + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data must begin at a multiple of 8 bytes
        self._stream = self._open(self.file)
        self._stream.write(len(text).to_bytes(8, "little") + text)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, of the planned dtype and shape."""
        assert name == self._waiting.pop(0), "tensors must be written in the planned order"
        assert (tensor.dtype, tuple(tensor.shape)) == self.planned[name], "dtype and shape must be as planned"
        if tensor.numel():
            self._stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        assert kind is not None or not self._waiting, "every planned tensor must be written"
