"""What the folder of a run says: ledger, configuration, curves, checkpoints. Any of it may be absent or damaged."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from automodel_trainer.callbacks.ledger_text import ledger_rows
from automodel_trainer.callbacks.rank_times import FILE as RANKS_FILE
from automodel_trainer.callbacks.rank_times import NAMES
from automodel_trainer.checkpoint.manifest import MANIFEST, check_checkpoint, read_manifest
from automodel_trainer.checkpoint.runs import runs, saved_in
from automodel_trainer.nn.chart import Curve
from automodel_trainer.tools.watch.curves import changed, curve_files, read_curves

LARGEST = 16 << 20  # bytes of a JSON or YAML file that are read
STILL = 120  # seconds without a change after which a run counts as over
Facts = dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint: its path, when it was written (seconds, or None), and "whole" or what is wrong with it."""

    path: Path
    created: float | None
    health: str


@dataclass
class Run:
    """A run as its folder shows it.

    Attributes:
        folder: of the run.
        curves: name → step → value.
        ledger: what the ledger wrote, or {}.
        config: text of `config.yaml`, or "".
        checkpoints: oldest first.
        pictures: SVG files of callbacks.
        ranks: lines about every rank (`callbacks/rank_times.py`), oldest first.
        age: seconds since a file of it last changed; None if nobody knows.
        problems: what could not be read.
    """

    folder: Path
    curves: dict[str, Curve] = field(default_factory=dict)
    ledger: Facts = field(default_factory=dict)
    config: str = ""
    checkpoints: list[Saved] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    ranks: list[Facts] = field(default_factory=list)
    age: float | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def going_on(self) -> bool:
        """Whether something was written lately, and the last step was not the last planned one."""
        planned = self.planned
        return self.age is not None and self.age < STILL and (planned is None or self.step < planned)

    @property
    def step(self) -> int:
        """How many steps were made, as far as curves and checkpoints say. Loggers count steps from 0."""
        logged = max((step + 1 for curve in self.curves.values() for step in curve), default=0)
        names = (re.fullmatch(r"step-(\d+)", saved.path.name) for saved in self.checkpoints)
        saved = max((int(name[1]) for name in names if name), default=0)
        return max(saved, logged if self.planned is None else min(logged, self.planned))

    @property
    def planned(self) -> int | None:
        """How many steps the run was to make, if the ledger says so."""
        steps = _inside(self.ledger, "run", "steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    def rows(self) -> list[tuple[str, str]]:
        """The lines of the ledger; what this version does not understand is shown as it is."""
        if not self.ledger:
            return []
        try:
            return [(str(name), str(text)) for name, text in ledger_rows(self.ledger)]
        except (KeyError, TypeError, AttributeError, ValueError, IndexError):
            return [(str(name), json.dumps(value, ensure_ascii=False)[:500]) for name, value in self.ledger.items()]


def read_run(folder: str | os.PathLike[str], *, contents: bool = False) -> Run:
    """Read the folder of a run; what cannot be read is listed and left out.

    Args:
        folder: the `default_root_dir` of a run.
        contents: compare the checksums of checkpoints, too; otherwise only names, sizes and headers.

    Raises:
        ValueError: there is no such folder, or it holds nothing that a run writes.
    """
    run = Run(Path(folder))
    if not run.folder.is_dir():
        raise ValueError(f"{folder} is not the folder of a run: there is no such folder. Give its default_root_dir.")
    try:
        names = os.listdir(run.folder)
    except PermissionError as error:
        raise ValueError(
            f"{folder} cannot be read: {error.strerror}. Ask its owner for the right to read it."
        ) from error
    run.curves, run.problems = read_curves(run.folder)
    ledger = _text(run, "ledger.json")
    if ledger:
        run.ledger = _parsed(run, ledger)
    run.config = _text(run, "config.yaml")
    run.ranks = _ranks(_text(run, RANKS_FILE))
    for base in _bases(run.folder):
        run.checkpoints += [_saved(path, contents) for path in saved_in(base)]
    run.pictures = sorted(path for depth in ("", "*/*/") for path in run.folder.glob(f"{depth}moe_load.svg"))
    if not (run.curves or run.ledger or run.config or run.checkpoints):
        held = ", ".join(sorted(names)[:5]) or "nothing"
        raise ValueError(
            f"{folder} is not the folder of a run: it holds {held}, and no ledger.json, config.yaml, curves or "
            "checkpoints. Give the default_root_dir of a run."
        )
    last = _last_change(run)
    run.age = _looks.age(run.folder.absolute(), last) if last else None
    return run


def settings(run: Run) -> dict[str, Any]:
    """The configuration as `trainer.max_steps` → value; {} where there is none that can be read."""
    try:
        return flat(yaml.safe_load(run.config) or {})
    except yaml.YAMLError:
        return {}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= flat(inner, f"{prefix}.{name}" if prefix else str(name))
    return found


def _text(run: Run, name: str) -> str:
    file = run.folder / name
    try:
        if not file.is_file():
            return ""
        if file.stat().st_size > LARGEST:
            run.problems.append(f"{name} has more than {LARGEST >> 20} MiB and is not shown")
            return ""
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        run.problems.append(f"{name}: {error.strerror}")
        return ""


def _parsed(run: Run, text: str) -> Facts:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        run.problems.append(f"ledger.json is half written or damaged: {error}")
        return {}
    if not isinstance(found, dict):
        run.problems.append("ledger.json is not what a run writes")
        return {}
    return found


def _ranks(text: str) -> list[Facts]:
    """The lines that have a number for each rank, as many as the last: it may be half written, or of another layout."""
    found = []
    for line in text.splitlines():
        try:
            facts = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(facts, dict) or not isinstance(facts.get("step"), int):
            continue
        if _numbers(facts.get(NAMES[0])):
            facts = {name: [0.0] * len(facts[NAMES[0]]) for name in NAMES[3:]} | facts  # version 0.1 had three
        if all(map(_numbers, map(facts.get, NAMES))):
            found.append(facts)
    return [facts for facts in found if all(len(facts[name]) == len(found[-1][NAMES[0]]) for name in NAMES)]


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, int | float) for value in values)


def _bases(folder: Path) -> list[Path]:
    return runs(folder / "checkpoints")


def _saved(path: Path, contents: bool) -> Saved:
    try:
        created = float(read_manifest(path)["created"])
        check_checkpoint(path, contents=contents)
    except (ValueError, OSError) as error:
        return Saved(path, None, str(error))
    return Saved(path, created, "whole")


def _last_change(run: Run) -> float:
    """Of the files that a run writes while it goes on."""
    files = [run.folder / "ledger.json", run.folder / RANKS_FILE, *curve_files(run.folder)]
    files += [saved.path / MANIFEST for saved in run.checkpoints]
    return max(map(changed, files))


class _Looks:
    """When this process saw runs change, by its own clock: that of the machine that writes may be wrong."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[float, float, bool]] = {}  # of each run: its last change, when it was seen, moved

    def age(self, folder: Path, changed: float) -> float:
        now = time.monotonic()
        before = self._seen.get(folder)
        if before is None or before[0] != changed:
            self._seen[folder] = (changed, now, before is not None)
        _, seen, moved = self._seen[folder]
        age = time.time() - changed
        return now - seen if moved or age < 0 else age


_looks = _Looks()


def _inside(facts: Any, *keys: str) -> Any:
    for key in keys:
        facts = facts.get(key) if isinstance(facts, dict) else None
    return facts
