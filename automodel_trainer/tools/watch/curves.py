"""Read the curves of a run: TensorBoard's event files and the CSV files of Lightning's logger, even half written."""

from __future__ import annotations

import csv
import struct
from collections.abc import Iterator
from pathlib import Path

from automodel_trainer.nn.chart import Curve

MOST_BYTES = 256 << 20  # of one file; what is beyond is left out, and said


def read_curves(folder: Path) -> tuple[dict[str, Curve], list[str]]:
    """Every logged number below a folder by name, and what could not be read.

    Files are read in the order of their last change, so that a resumed run continues its curves.
    """
    curves: dict[str, Curve] = {}
    problems: list[str] = []
    for file in curve_files(folder):
        try:
            for name, step, value in _rows(file):
                curves.setdefault(name, {})[step] = value
            if file.stat().st_size > MOST_BYTES:
                problems.append(f"{file.name} has more than {MOST_BYTES >> 20} MiB; its end is not shown")
        except (OSError, ValueError) as error:
            problems.append(f"{file.relative_to(folder)}: {error}")
    return {name: dict(sorted(curve.items())) for name, curve in sorted(curves.items())}, problems


def curve_files(folder: Path) -> list[Path]:
    """The files of loggers in a run's folder, in the order of their last change."""
    found = [path for pattern in ("events.out.tfevents.*", "metrics.csv") for path in _below(folder, pattern)]
    return sorted(found, key=lambda path: (changed(path), path.name))


def changed(path: Path) -> float:
    """When a file last changed, in seconds; 0 if it is gone by now."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _below(folder: Path, pattern: str) -> Iterator[Path]:
    """Loggers write into the folder, or at most three folders below it; checkpoints are not searched."""
    for depth in ("", "*/", "*/*/", "*/*/*/"):
        for path in folder.glob(depth + pattern):
            if path.is_file() and "checkpoints" not in path.relative_to(folder).parts[0]:
                yield path


def _rows(file: Path) -> Iterator[tuple[str, int, float]]:
    return _of_csv(file) if file.suffix == ".csv" else _of_events(file)


def _of_csv(file: Path) -> Iterator[tuple[str, int, float]]:
    with file.open(newline="", encoding="utf-8", errors="replace") as stream:
        for row in csv.DictReader(stream):
            step = row.get("step") or ""
            if not step.isdigit():
                continue  # a line that is being written
            for name, text in row.items():
                if name not in (None, "step", "epoch") and text and (value := _number(text)) is not None:
                    yield name, int(step), value


def _of_events(file: Path) -> Iterator[tuple[str, int, float]]:
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    for record in records(file):
        try:
            event = Event.FromString(record)
        except DecodeError as error:
            raise ValueError(f"a damaged record: {error}") from error
        for value in event.summary.value:
            number = value.simple_value if value.HasField("simple_value") else _scalar(value.tensor)
            if number is not None:
                yield value.tag, int(event.step), float(number)


def records(file: Path) -> Iterator[bytes]:
    """The whole records of an event file: length (8 bytes), checksum (4), content, checksum (4). A torn end is left."""
    with file.open("rb") as stream:
        read = 0
        while len(head := stream.read(12)) == 12 and read < MOST_BYTES:
            (length,) = struct.unpack("<Q", head[:8])
            if length > MOST_BYTES:
                raise ValueError(f"a damaged record at byte {read}")
            content = stream.read(length + 4)
            if len(content) < length + 4:
                return
            read += length + 16
            yield content[:-4]


def _scalar(tensor: object) -> float | None:
    values = [*getattr(tensor, "float_val", ()), *getattr(tensor, "double_val", ())]
    return values[0] if len(values) == 1 else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
