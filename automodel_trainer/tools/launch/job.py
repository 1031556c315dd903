"""What a launch file is written from: a run, its machines, its time, and where its folders lie."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from automodel_trainer.callbacks.preemption import MARKER
from automodel_trainer.checkpoint.remote import is_remote, scratch
from automodel_trainer.data.cache import cache_root

SHARED = "/shared"
"""Where containers find the volume that all nodes share."""
PORT = 29500
RESTARTS = 3
"""How often torchrun starts the ranks again after a crash."""
SAVE_SECONDS = 300
"""Between the warning of a scheduler and the end: the time to save."""
_START_SECONDS = 600
_SHORTEST = 600


@dataclass(frozen=True)
class Job:
    """A run and the machines that it gets.

    Attributes:
        config: the YAML of the run.
        name: of the job: letters, digits and hyphens.
        nodes, gpus: machines, and GPUs (so ranks) on each.
        root: the run's folder, which every node must see, or a URL.
        options: further options of `amt fit`.
        layout: the sizes in words.
        notes: what a user should look at.
        seconds: the queue's time limit; None: it has none.
        max_time: of the run; None: no limit.
        image: of the container; None: what is installed.
        cache: the folder of caches; None: the default of each kind of file.
        partition, account: of Slurm.
        gpu_type: the accelerator, as SkyPilot names it.
        volume: a claim or volume that is mounted at `SHARED`.
    """

    config: Path
    name: str
    nodes: int
    gpus: int
    root: str
    options: tuple[str, ...] = ()
    layout: str = ""
    notes: tuple[str, ...] = ()
    seconds: int | None = None
    max_time: str | None = None
    image: str | None = None
    cache: str | None = None
    partition: str | None = None
    account: str | None = None
    gpu_type: str = "H100"
    volume: str | None = None

    def arguments(self, config: str, root: str | None = None) -> str:
        """The arguments of `amt`, quoted for a shell.

        Args:
            config: where the YAML lies on the machine that runs.
            root: the run's folder there; None: as the YAML has it.
        """
        words = ["fit", "--config", config, *self.options]
        words += ["--trainer.num_nodes", str(self.nodes), "--trainer.devices", str(self.gpus)]
        if root is not None:
            words += ["--trainer.default_root_dir", root]
        if self.max_time is not None:
            words += ["--trainer.max_time", self.max_time]
        if not any(option.partition("=")[0] == "--ckpt_path" for option in self.options):
            words += ["--ckpt_path", "auto"]
        return " ".join(shlex.quote(word) for word in words)

    def title(self, how: str) -> list[str]:
        """The first lines of a file: what it is, how it is started, and what to look at."""
        gpus = f"{self.nodes} x {self.gpus} GPUs" if self.nodes > 1 else f"{self.gpus} GPU(s)"
        lines = [f"# {_one_line(self.name)}: {gpus}, {self.layout}. Written by amt launch.", f"#   {how}"]
        return lines + [f"# Look at: {_one_line(note)}" for note in self.notes]


def marker(root: str) -> str:
    """The file that a stopped run leaves, as a word of a shell in which AMT_CACHE is set."""
    if is_remote(root):
        below = scratch(root).relative_to(cache_root()).as_posix()
        return f'"$AMT_CACHE"/{shlex.quote(below)}/{MARKER}'
    return f"{shlex.quote(root)}/{MARKER}"


def seconds_of(text: str) -> int:
    """A time limit of a queue, in seconds.

    Args:
        text: `HH:MM:SS`, or `D-HH:MM:SS`.

    Raises:
        ValueError: it is written otherwise, or too short to train in.
    """
    parts = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text.strip())
    if parts is None:
        raise ValueError(f"--time {text!r} is not a time limit. Write HH:MM:SS or D-HH:MM:SS, for example 04:00:00.")
    days, hours, minutes, rest = (int(part or 0) for part in parts.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if total < _SHORTEST:
        raise ValueError(f"--time {text} is too short to start, train and save. Give at least 00:10:00.")
    return total


def clock(seconds: int) -> str:
    """`HH:MM:SS`, hours beyond 24 too."""
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def max_time_below(seconds: int) -> str:
    """`Trainer(max_time=)` under a queue's limit: less the time to start, 10 minutes or a tenth if that is less."""
    left = seconds - min(_START_SECONDS, seconds // 10)
    return f"{left // 86400:02d}:{clock(left % 86400)}"


def name_of(text: str) -> str:
    """A job's name from any text: lower-case letters, digits and hyphens, at most 50, a letter first."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (words if words[:1].isalpha() else f"run-{words}".strip("-"))[:50].rstrip("-")


def yaml_string(text: str) -> str:
    """A text as a double-quoted string of YAML."""
    return json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)
