"""Run an encoder over rows, on one core or on all: every process writes its samples itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from datasets.utils import tqdm

from automodel_trainer.data.in_processes import FORKS, in_processes

ROWS_PER_PROCESS = 1000
"""Start one process per this many rows."""
_BATCH = 100  # rows that an encoder gets at a time
_PARTS = 16  # for each process, so that all end at about the same time, however long the rows of a part are

Columns = dict[str, list[Any]]
Encoder = Callable[[Columns, list[int]], Columns]
"""Takes columns of rows and the row numbers; returns columns of samples: `input_ids`, `sample_id`, maybe `trained`."""


class _Work(NamedTuple):
    """What every process knows."""

    rows: Dataset
    encode: Encoder
    schema: pa.Schema
    folder: Path | None


def encode_rows(rows: Dataset, encode: Encoder, features: Features, folder: Path | None, processes: int) -> Dataset:
    """Encode rows, in their order.

    Args:
        rows: the data set.
        encode: the encoder.
        features: the columns that it returns.
        folder: where the samples are written, in Arrow files; None: they are kept in memory.
        processes: how many work at a time.

    Returns:
        The samples.

    Raises:
        ValueError: `encode` refuses a row, or a process was ended, most often because memory ran out.
    """
    work = _Work(rows.with_format(None), encode, features.arrow_schema, folder)  # plain values, whatever the user set
    with tqdm(total=len(rows), unit=" rows", desc="Tokenizing") as bar:
        if processes == 1:
            tables = [_read(_write(work, range(len(rows)), bar.update))]
        else:
            parts, tables = _parts(len(rows), processes), []
            for part, written in zip(parts, in_processes(_write, work, parts, processes)):
                tables.append(_read(written))
                bar.update(len(part))
    return Dataset(pa.concat_tables(tables), fingerprint="encoded")  # without one, every value would be hashed


def processes_for(rows: int) -> int:
    """How many processes encode so many rows: one for each core, and one for a few rows.

    One also where processes are not forked: an encoder cannot be pickled. There the tokenizer uses threads.
    """
    if not FORKS:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(1, min(cores, rows // ROWS_PER_PROCESS))


def _parts(rows: int, processes: int) -> list[range]:
    """Consecutive rows that a process encodes at a time."""
    size = -(-rows // (processes * _PARTS))
    size = -(-size // _BATCH) * _BATCH
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def _write(work: _Work, part: range, done: Callable[[int], Any] = lambda rows: None) -> Path | pa.Buffer:
    """The samples of some rows, as an Arrow stream in a file or in memory."""
    path = None if work.folder is None else work.folder / f"rows-{part.start:012d}.arrow"
    sink = pa.BufferOutputStream() if path is None else pa.OSFile(str(path), "wb")
    with sink:
        with pa.ipc.new_stream(sink, work.schema) as writer:
            for start in range(part.start, part.stop, _BATCH):
                numbers = list(range(start, min(start + _BATCH, part.stop)))
                samples = work.encode(work.rows[numbers[0] : numbers[-1] + 1], numbers)
                columns = [_column(samples[field.name], field.type) for field in work.schema]
                writer.write_batch(pa.record_batch(columns, schema=work.schema))
                done(len(numbers))
        return sink.getvalue() if path is None else path


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values as an Arrow array; lists of numbers as one array, because Arrow copies a list one object at a time."""
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    dtype = kind.value_type.to_pandas_dtype()
    arrays = [np.asarray(value, dtype) for value in values]
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    flat = np.concatenate(arrays) if arrays else np.zeros(0, dtype)
    return pa.ListArray.from_arrays(offsets, pa.array(flat, kind.value_type), type=kind)


def _read(written: Path | pa.Buffer) -> pa.Table:
    """What was written, without a copy."""
    source = pa.memory_map(str(written)) if isinstance(written, Path) else written
    return pa.ipc.open_stream(source).read_all()
