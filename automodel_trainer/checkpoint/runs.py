"""Find the checkpoints in a run's folder, and the folders of runs that share a name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from automodel_trainer.checkpoint.folder import TEMPORARY
from automodel_trainer.checkpoint.manifest import MANIFEST, check_checkpoint, only_manifest, read_manifest

LATEST, BEST = "latest", "best"


def step_folder(step: int) -> str:
    """Folder name of the checkpoint of an optimizer step."""
    return f"step-{step:08d}"


def described(folder: Path) -> str:
    """A checkpoint in a message: `step 10`, or its name if a user has chosen it."""
    number = folder.name.removeprefix("step-")
    return f"step {int(number)}" if re.fullmatch(r"step-\d+", folder.name) else folder.name


def saved_in(run: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first. Folders without a manifest are not checkpoints."""
    return [path for path in _step_folders(run) if (path / MANIFEST).is_file()]


def _step_folders(run: Path) -> list[Path]:
    """Checkpoints and what was to be one; a name that the user chose is known by the manifest."""
    if not run.is_dir():
        return []
    folders = [path for path in run.iterdir() if path.is_dir() and not path.is_symlink() and TEMPORARY not in path.name]
    found = [path for path in folders if re.fullmatch(r"step-\d+", path.name) or (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: (created(path), path.name))


def runs(base: Path) -> list[Path]:
    """The existing folders among `base`, `base-v1`, `base-v2`, …, oldest run first."""
    if not base.parent.is_dir():
        return []
    pattern = re.compile(re.escape(base.name) + r"(?:-v(\d+))?")
    numbered = [(pattern.fullmatch(path.name), path) for path in base.parent.iterdir() if path.is_dir()]
    return [path for _, path in sorted((int(match[1] or 0), path) for match, path in numbered if match)]


def new_run(base: Path, taken: Collection[str] = ()) -> Path:
    """The folder for a new run: the first of `base`, `base-v1`, … that has no checkpoints.

    Args:
        base: the folder of the first run.
        taken: suffixes that must not be used (runs in object storage).
    """
    version, run = 0, base
    while _step_folders(run) or run.name.removeprefix(base.name) in taken:
        version += 1
        run = base.with_name(f"{base.name}-v{version}")
    return run


def newest_whole(run: Path) -> Path | None:
    """The newest undamaged checkpoint in a run's folder, with a warning for each that is not; None if there is none."""
    return _first_whole(reversed(saved_in(run)))


def _first_whole(checkpoints: Iterable[Path]) -> Path | None:
    for checkpoint in checkpoints:
        if only_manifest(checkpoint):
            continue  # object storage has it
        try:
            check_checkpoint(checkpoint)
        except ValueError as error:
            rank_zero_warn(f"Skipping a damaged checkpoint: {error}")
        else:
            return checkpoint
    return None


def find_last(base: Path, whole: bool = False) -> Path | None:
    """The newest checkpoint of all runs; None if there is none.

    Args:
        base: the folder of the first run.
        whole: check checkpoints by reading them, and skip damaged ones with a warning. False: return the newest one
            unchecked; loading it raises if it is damaged.
    """
    everything = [checkpoint for run in runs(base) for checkpoint in _step_folders(run)]
    newest_first = sorted(everything, key=created, reverse=True)
    return _first_whole(newest_first) if whole else next(iter(newest_first), None)


def find_best(base: Path) -> Path | None:
    """The checkpoint that `best` points to, in the newest run that has such a link; None if none has."""
    links = [run / BEST for run in runs(base) if (run / BEST).is_dir()]
    return links[-1].resolve() if links else None


def created(checkpoint: Path) -> float:
    """When a checkpoint was written, in seconds. Without a readable manifest, when its folder or file last changed."""
    try:
        return float(read_manifest(checkpoint)["created"])
    except (ValueError, NotADirectoryError):
        return checkpoint.stat().st_mtime
