"""RunFolder: where the checkpoints of a run lie, which of them is the newest, and which is the best."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.callbacks import Checkpoint

from automodel_trainer.callbacks.checkpoint_schedule import Schedule
from automodel_trainer.checkpoint.remote import RemoteRuns, download_best, download_last, is_remote, local_root
from automodel_trainer.checkpoint.runs import find_best, find_last, newest_whole


class RunFolder(Checkpoint):
    """The part of `DCPCheckpoint` that finds checkpoints.

    Args:
        dirpath: see `DCPCheckpoint`.
        schedule: what is kept, and by which metric.

    Attributes:
        run_folder, last_model_path, scores: see `DCPCheckpoint`.

    Raises:
        ValueError: the object storage of `dirpath` cannot be used.
    """

    def __init__(self, dirpath: str | Path | None, schedule: Schedule) -> None:
        self.schedule = schedule
        self.remote = RemoteRuns(str(dirpath)) if is_remote(dirpath) else None
        self.dirpath = None if dirpath is None or self.remote is not None else Path(dirpath)
        self.run_folder: Path | None = None
        self.last_model_path = ""
        self.scores: dict[str, float] = {}

    def find_last(self, default_root_dir: str | Path, whole: bool = False) -> Path | None:
        """The newest checkpoint of this and earlier runs; None if there is none.

        Args:
            default_root_dir: the Trainer's folder.
            whole: skip damaged checkpoints, with a warning for each.

        Raises:
            ValueError: without `whole`, the newest checkpoint in object storage is damaged.
        """
        base, remote = self._base(default_root_dir), self._store(default_root_dir)
        local = find_last(base, whole)
        return local if remote is None else download_last(remote, base, local, whole)

    def find_last_of(self, run: Path, default_root_dir: str | Path) -> Path | None:
        """The newest undamaged checkpoint of one run, here or in object storage; None if there is none.

        Args:
            run: its local folder.
            default_root_dir: the Trainer's folder.
        """
        base, remote = self._base(default_root_dir).absolute(), self._store(default_root_dir)
        local = newest_whole(run)
        if remote is None or run.absolute().parent != base.parent:
            return local
        return download_last(remote, base, local, whole=True, only=run.name.removeprefix(base.name))

    def find_best(self, default_root_dir: str | Path) -> Path | None:
        """The best checkpoint of the newest run that has one; None if there is none."""
        base, remote = self._base(default_root_dir), self._store(default_root_dir)
        return find_best(base) if remote is None else download_best(remote, base)

    @property
    def monitor(self) -> str | None:
        """The metric that is monitored."""
        return self.schedule.monitor

    @property
    def mode(self) -> str:
        """Whether a lower (`min`) or a higher (`max`) score is better."""
        return self.schedule.mode

    @property
    def save_top_k(self) -> int | None:
        """As ModelCheckpoint has it; loggers ask for it."""
        return -1 if self.schedule.keep_best is None else self.schedule.save_top_k

    @property
    def save_last(self) -> bool | str | None:
        """As ModelCheckpoint has it; loggers ask for it."""
        return self.schedule.save_last

    @property
    def best_model_path(self) -> str:
        """The best checkpoint of this run; without a monitor the newest. "" if there is none."""
        if self.monitor is None:
            return self.last_model_path
        ranked = self._ranked()
        return str(self.run_folder / ranked[0]) if ranked and self.run_folder is not None else ""

    @property
    def best_model_score(self) -> float | None:
        """The score of the best checkpoint, or None."""
        ranked = self._ranked()
        return self.scores[ranked[0]] if ranked else None

    @property
    def best_k_models(self) -> dict[str, float]:
        """Maps the best checkpoints that are kept to their scores, best first."""
        if self.run_folder is None:
            return {}
        return {str(self.run_folder / name): self.scores[name] for name in self._ranked()[: self.schedule.keep_best]}

    def _ranked(self) -> list[str]:
        """Names of scored checkpoints, best first. Of equal ones, the earlier is first."""
        sign = 1 if self.mode == "min" else -1
        return sorted(self.scores, key=lambda name: (sign * self.scores[name], name))

    def _base(self, default_root_dir: str | Path) -> Path:
        """The local folder of the first run."""
        return self.dirpath or local_root(default_root_dir) / "checkpoints"

    def _store(self, default_root_dir: str | Path) -> RemoteRuns | None:
        """The store that checkpoints are copied to."""
        if self.remote is None and self.dirpath is None and is_remote(default_root_dir):
            return RemoteRuns(f"{str(default_root_dir).rstrip('/')}/checkpoints")
        return self.remote
