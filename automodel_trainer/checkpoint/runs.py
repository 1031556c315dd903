"""The checkpoints of a run in their folder, and the runs beside each other."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from automodel_trainer.checkpoint.manifest import MANIFEST, check_checkpoint, read_manifest

LATEST, BEST = "latest", "best"


def step_folder(step: int) -> str:
    """The name of the checkpoint of an optimizer step."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def saved_in(run: Path) -> list[Path]:
    """The checkpoints in a run's folder in the order they were written; what has no manifest is none."""
    return [path for path in _step_folders(run) if (path / MANIFEST).is_file()]


def _step_folders(run: Path) -> list[Path]:
    found = [path for path in run.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (created(path), path.name))


def runs(base: Path) -> list[Path]:
    """`base`, `base-v1`, `base-v2`, … as far as they are there."""
    if not base.parent.is_dir():
        return []
    pattern = re.compile(re.escape(base.name) + r"(?:-v(\d+))?")
    numbered = [(pattern.fullmatch(path.name), path) for path in base.parent.iterdir() if path.is_dir()]
    return [path for _, path in sorted((int(match[1] or 0), path) for match, path in numbered if match)]


def new_run(base: Path, taken: Collection[str] = ()) -> Path:
    """A folder of which no checkpoint of an earlier run is in the way; its suffix is none of those `taken`."""
    version, run = 0, base
    while _step_folders(run) or run.name.removeprefix(base.name) in taken:
        version += 1
        run = base.with_name(f"{base.name}-v{version}")
    return run


def find_last(base: Path, whole: bool = False) -> Path | None:
    """The newest checkpoint of all runs; None if there is none.

    Args:
        base: the folder of the first run.
        whole: read what is found, and pass over what is damaged, with a warning each. Otherwise the newest is returned
            as it is: loading it says what is wrong with it.
    """
    everything = [checkpoint for run in runs(base) for checkpoint in _step_folders(run)]
    for checkpoint in sorted(everything, key=created, reverse=True):
        try:
            if whole:
                check_checkpoint(checkpoint)
        except ValueError as error:
            rank_zero_warn(f"Passing over a damaged checkpoint: {error}")
        else:
            return checkpoint
    return None


def find_best(base: Path) -> Path | None:
    """What `best` points to in the newest run that has one."""
    links = [run / BEST for run in runs(base) if (run / BEST).is_dir()]
    return links[-1].resolve() if links else None


def created(checkpoint: Path) -> float:
    """When it was written; where the manifest cannot tell, when its folder was last changed (so by the damage)."""
    try:
        return float(read_manifest(checkpoint)["created"])
    except ValueError:
        return checkpoint.stat().st_mtime
