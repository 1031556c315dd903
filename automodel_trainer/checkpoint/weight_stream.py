"""Rewrite weight files with other shards, another dtype or other names, with few tensors in memory at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from torch import Tensor

from automodel_trainer.checkpoint.safetensors_stream import DTYPES, SafetensorsWriter
from automodel_trainer.models.files import INDEX_NAME, WEIGHTS_NAME, TensorSlice, slices_of, weight_files
from automodel_trainer.models.quantization.checkpoint import dense_weights, quantization_of
from automodel_trainer.models.quantization.dense import DenseWeight

Advance = Callable[[int], None]
"""Advances a progress bar by a number of bytes."""
Header = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Maps tensor names to dtype and shape."""
Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Converts the names and shapes of some tensors."""


def header_of(file: Path) -> Header:
    """Dtype and shape of every tensor in a safetensors file, in the order of the file."""
    with safe_open(file, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.offset_keys()}
        return {name: (DTYPES[part.get_dtype()], tuple(part.get_shape())) for name, part in slices.items()}


class Weights:
    """The tensors of a model folder by name. Values are read on demand.

    Args:
        folder: a folder with safetensors files.
        dense: show weights that are quantized as dense weights of this dtype. None: show what the files hold.

    Attributes:
        files: the weight files.
        file_of: maps tensor names to files.
        header: dtype and shape of every tensor.

    Raises:
        ValueError: there are no safetensors files, or one is damaged; or `dense` is given, and the weights are
            quantized by a method that is not read here. The message names the file or the method.
    """

    def __init__(self, folder: Path, dense: torch.dtype | None = None) -> None:
        self.folder = folder
        self.files = weight_files(folder)
        slices = slices_of(self.files)
        self.file_of = {name: part.file for name, part in slices.items()}
        self._slices: Mapping[str, TensorSlice] = slices
        made: dict[str, DenseWeight] = {}
        quantization = quantization_of(folder) if dense is not None else None
        if dense is not None and quantization is not None:
            self._slices = dense_weights(slices, quantization, folder)
            made = {name: part for name, part in self._slices.items() if isinstance(part, DenseWeight)}
            self.file_of |= {name: self.file_of[part.name] for name, part in made.items()}
        self.header: Header = {
            name: (dense if dense is not None and name in made else DTYPES[part.get_dtype()], tuple(part.get_shape()))
            for name, part in self._slices.items()
        }

    def show_again(self, name: str, as_name: str) -> None:
        """Show a tensor under a second name too, for a model that no longer ties two weights."""
        self._slices = {**self._slices, as_name: self._slices[name]}
        self.header[as_name], self.file_of[as_name] = self.header[name], self.file_of[name]

    def by_file(self) -> dict[Path, Header]:
        """Dtype and shape of every tensor, by file; a file that holds scales alone is left out."""
        found: dict[Path, Header] = {}
        for name, entry in self.header.items():
            found.setdefault(self.file_of[name], {})[name] = entry
        return found

    def meta(self) -> dict[str, Tensor]:
        """All tensors on meta, without values."""
        return {n: torch.empty(shape, dtype=dtype, device="meta") for n, (dtype, shape) in self.header.items()}

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read some tensors. Files are closed again at once, because some systems count mapped files as memory."""
        return {name: self.exact(name).to(self.header[name][0]) for name in names}

    def exact(self, name: str) -> Tensor:
        """Read one tensor; what codes and scales stand for in fp32, not rounded to the dtype in the header."""
        return self._slices[name][...]


def write_stream(
    weights: Weights,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    shards: int | None = None,
    max_shard_size: int | str = "5GB",
    groups: Sequence[Sequence[str]] | None = None,
    convert: Convert | None = None,
    title: str = "weights",
) -> None:
    """Write `weights` into the folder `target` as safetensors files, with an index if there are several.

    Only the tensors of one group, and their converted versions, are in memory.

    Args:
        weights: the weights to read.
        target: the folder to write into.
        dtype: dtype of floating-point weights; None keeps the dtype of each weight.
        shards: number of files, of about the same size. None: as many as `max_shard_size` requires.
        max_shard_size: maximum size of a file, in bytes or as text such as "5GB".
        groups: names of tensors that must be converted together. None: each tensor alone.
        convert: converts names and shapes of the tensors of a group. It is also called with tensors on meta.
        title: label of the progress bar.

    Raises:
        ValueError: there are more shards than tensors, or `dtype` is given for quantized weights.
        OSError: a file cannot be written. It names the folder.
    """
    # Convert on meta first: the headers of all files must be known before the first tensor is written.
    meta, change = weights.meta(), convert or _same
    groups = groups or [[name] for name in meta]
    planned: dict[str, Tensor] = {}
    for group in groups:
        planned |= {n: _cast(n, t, dtype) for n, t in change({name: meta[name] for name in group}).items()}
    file_of = _split(planned, shards, max_shard_size)
    headers: dict[str, Header] = {}
    for name, tensor in planned.items():
        headers.setdefault(file_of[name], {})[name] = (tensor.dtype, tuple(tensor.shape))
    with (
        _naming(target),
        ExitStack() as stack,
        progress(title, sum(t.nbytes for t in planned.values())) as advance,
    ):
        writers = {f: stack.enter_context(SafetensorsWriter(target / f, header)) for f, header in headers.items()}
        for group in groups:
            for name, tensor in change(weights.read(group)).items():
                writers[file_of[name]].write(name, cast := _cast(name, tensor, dtype))
                advance(cast.nbytes)
    if len(headers) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in planned.values())}
        index = {"metadata": total, "weight_map": file_of}
        (target / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Names the folder in what the system says of a write, which names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error


def _same(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    if tensor.dtype.itemsize < 2:
        raise ValueError(f"{name} is {tensor.dtype}: quantized weights cannot be cast. Leave out dtype.")
    return tensor.to(dtype)


def _split(planned: Mapping[str, Tensor], shards: int | None, max_shard_size: int | str) -> dict[str, str]:
    """The name of each tensor's file."""
    if shards is None:
        return split_torch_state_dict_into_shards(dict(planned), max_shard_size=max_shard_size).tensor_to_filename
    if not 1 <= shards <= len(planned):
        raise ValueError(f"{len(planned)} tensors cannot be split into {shards} files: give 1 to {len(planned)}.")
    if shards == 1:
        return dict.fromkeys(planned, WEIGHTS_NAME)
    total, before, number = sum(tensor.nbytes for tensor in planned.values()), 0, 0
    file_of: dict[str, str] = {}
    for place, (name, tensor) in enumerate(planned.items()):
        # Go on to the next file when this one has its share, or when there is only one tensor left per file.
        full = number and before + tensor.nbytes / 2 >= total * number / shards
        if not number or full or len(planned) - place <= shards - number:
            number = min(shards, number + 1)
        file_of[name] = f"model-{number:05d}-of-{shards:05d}.safetensors"
        before += tensor.nbytes
    return file_of


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show a progress bar that disappears at the end, if stderr is a terminal. Yields `advance(bytes)`.

    Args:
        title: label of the bar.
        total: number of bytes.
    """
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
