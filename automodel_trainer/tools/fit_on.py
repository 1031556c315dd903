"""`amt fit --on ray --workers 8 …`: options and YAML travel to the workers of a cluster, which run `amt fit`."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

CONFIG = ("--config", "-c")
_HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1"]  # the driver may have no GPU
_THERE = ["--trainer.devices=auto", "--trainer.num_nodes=1"]


def take(argv: list[str]) -> tuple[str | None, int | tuple[int, int] | None, list[str]]:
    """Take `--on` and `--workers` out of the options.

    Returns:
        where to run (None: here), the number of workers or the least and the largest, and the other options.

    Raises:
        ValueError: one of the two is missing or wrong.
    """
    found: dict[str, str] = {}
    rest = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--on", "--workers"):
            found[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    if not found:
        return None, None, rest
    if argv[0] != "fit":
        raise ValueError(f"--on and --workers are options of amt fit, not of amt {argv[0]}.")
    if len(found) < 2:
        raise ValueError("--on ray and --workers N belong together: give both, or neither.")
    numbers = found["--workers"].split("-")
    if not 1 <= len(numbers) <= 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"--workers {found['--workers']} is no number. Write 8, or 4-8 for a run that is resized.")
    least, most = int(numbers[0]), int(numbers[-1])
    return found["--on"], least if len(numbers) == 1 else (least, most), rest


def fit_on(on: str, workers: int | tuple[int, int] | None, argv: list[str]) -> int:
    """Run `amt fit` on every worker of a cluster, and return the exit code.

    Raises:
        ValueError: the run does not fit the workers, or one of them refuses it.
    """
    from automodel_trainer.cluster.ray_train import check_address, check_workers, run_on_ray
    from automodel_trainer.lightning_cli import build
    from automodel_trainer.strategies import MeshStrategy
    from automodel_trainer.tools.launch.check import local_files

    check_address(on)
    options = argv[1:]
    trainer, module, data = build([*options, *_HERE])
    strategy = trainer.strategy
    sizes = check_workers(workers, strategy.requested_dims if isinstance(strategy, MeshStrategy) else None)
    files = {option: os.path.abspath(path) for option, path in local_files(module, data).items()}
    task = partial(_fit, options, _read(options), files)
    outcome = run_on_ray(task, on, sizes, gpu=None, root=str(trainer.default_root_dir))
    if outcome.checkpoint is not None:
        print(f"The newest checkpoint is {outcome.checkpoint}.")
    return outcome.exit_code


def _read(options: list[str]) -> dict[str, str]:
    """The texts of all YAML files among the options."""
    return {path: Path(path).read_text(encoding="utf-8") for path in _configs(options)}


def _configs(options: list[str]) -> list[str]:
    paths = []
    for word, following in zip(options, [*options[1:], ""]):
        name, equals, value = word.partition("=")
        if name in CONFIG:
            paths.append(value if equals else following)
    return paths


def _fit(options: list[str], texts: dict[str, str], files: dict[str, str]) -> Any:
    """One worker's `amt fit`."""
    from automodel_trainer.cluster.worker import check_files, outcome_of
    from automodel_trainer.lightning_cli import run

    check_files(files)
    with tempfile.TemporaryDirectory() as folder:
        places = {}
        for number, (path, text) in enumerate(texts.items()):
            places[path] = str(Path(folder) / f"{number}-{Path(path).name}")
            Path(places[path]).write_text(text, encoding="utf-8")
        trainer = run(["fit", *(_placed(word, places) for word in options), *_THERE]).trainer
    last = getattr(trainer.checkpoint_callback, "last_model_path", None)
    return outcome_of(trainer, last or None)


def _placed(word: str, places: dict[str, str]) -> str:
    name, equals, value = word.partition("=")
    if equals and name in CONFIG:
        return f"{name}={places[value]}"
    return places.get(word, word)
