"""LightningCLI for `amt fit | validate | test | predict`."""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from importlib import import_module
from typing import Any, ClassVar, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from automodel_trainer._jsonargparse import all_actions
from automodel_trainer.callbacks import (
    BatchPreview,
    DCPCheckpoint,
    HFExport,
    Ledger,
    Preemption,
    ProgressLine,
    SampleGenerations,
    Throughput,
    Watchdog,
)
from automodel_trainer.checkpoint.remote import local_root
from automodel_trainer.data import (
    ChatDataModule,
    ImageTextDataModule,
    MockDataModule,
    TextDataModule,
    TokenDataModule,
)
from automodel_trainer.imports import importing
from automodel_trainer.modules import DEFAULT_OBJECTIVE, HuggingFaceModule, objective_named
from automodel_trainer.short_options import expand, named_model
from automodel_trainer.trainer import Trainer

CONFIG_NAME = "config.yaml"

# Known by their short names in YAML, as Lightning's own are.
__all__ = [
    "AmtCLI",
    "BatchPreview",
    "ChatDataModule",
    "DCPCheckpoint",
    "HFExport",
    "ImageTextDataModule",
    "Ledger",
    "MockDataModule",
    "Preemption",
    "ProgressLine",
    "SampleGenerations",
    "TextDataModule",
    "Throughput",
    "TokenDataModule",
    "Watchdog",
    "build",
    "run",
]


_NOT_ACCEPTED = re.compile(r"(?:does not accept option|Option|Key|No action for key) ['\"]([\w.]+)['\"]")
_UNRECOGNIZED = re.compile(r"[Uu]nrecognized arguments: --([\w.]+)")
_CLASS = re.compile(r"given class_path '([\w.]+)'")


class AmtParser(LightningArgumentParser):
    """Says in two lines what is wrong with a configuration, and names the nearest known key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        found = _NOT_ACCEPTED.search(message) or _UNRECOGNIZED.search(message)
        if found is None:
            self.exit(2, f"amt: {message}\n")
        unknown, owners = found.group(1), _CLASS.findall(message[: found.start()])
        known = _arguments_of(owners[-1]) if owners else [action.dest for action in all_actions(self)]
        where = f" of {owners[-1].rpartition('.')[2]}" if owners else ""
        self.exit(2, f"amt: {unknown!r} is not an option{where}.{_nearest(unknown, known)}\n")
        raise AssertionError("exit() exits")


def _arguments_of(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(import_module(module), name)).parameters)


def _nearest(unknown: str, known: list[str]) -> str:
    """A hint by the whole key, or by its last part (`trainer.max_epoch`, `max_epoch`)."""
    tops = sorted({name.partition(".")[0] for name in known} - {"help", "print_config", "config"})
    head = unknown.partition(".")[0]
    if head != unknown and head not in tops:
        unknown, known = head, tops
    leaves = {name.rpartition(".")[2]: name for name in known}
    match = difflib.get_close_matches(unknown, known, n=1) or [
        leaves[leaf] for leaf in difflib.get_close_matches(unknown.rpartition(".")[2], leaves, n=1)
    ]
    if match:
        return f" Did you mean {match[0]!r}?"
    return f" Allowed: {', '.join(tops)}."


class SaveRunConfig(SaveConfigCallback):
    """Writes the run's whole configuration to `<default_root_dir>/config.yaml`; checkpoints take a copy along."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        folder = local_root(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, folder / CONFIG_NAME, skip_none=False, overwrite=True, multifile=self.multifile)


class AmtCLI(LightningCLI):
    """`model:` and `data:` are the objective and data module of the named model unless a `class_path` says otherwise.

    Attributes:
        objective: of the model that the arguments name; `_cli` sets it before they are parsed.
        command: that runs, as well.
    """

    trainer: Trainer
    objective: ClassVar[type[HuggingFaceModule]] = DEFAULT_OBJECTIVE
    command: ClassVar[str] = "fit"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults(
            {
                "model": {"class_path": f"automodel_trainer.{self.objective.__name__}"},
                "data": {"class_path": f"automodel_trainer.{self.objective.data_class.__name__}"},
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args`, which imports the classes that they name."""
        with importing():
            super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        """Make the trainer, the model and the data, which imports what they need."""
        with importing():
            super().instantiate_classes()

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """What the command's method takes that is no option. Other commands, each a parser more, are left out."""
        loaders = {"train_dataloaders", "val_dataloaders"} if cls.command == "fit" else {"dataloaders"}
        return {cls.command: {"model", "data", "datamodule"} | loaders}


def run(argv: list[str]) -> AmtCLI:
    """Parse `argv` (command first), build trainer, model and data, and run the command.

    Short options are known (`--model org/name`). `--help-all` is the parser's own help.
    """
    command, options = argv[0], argv[1:]
    options = ["--help" if option == "--help-all" else option for option in options]
    AmtCLI.command = command
    return _cli([command, *expand(options)], run=True)


def build(config: dict[str, Any] | list[str]) -> tuple[Trainer, pl.LightningModule, pl.LightningDataModule]:
    """Trainer, module and data that a configuration (or `--config FILE` and options) describes; nothing runs."""
    cli = _cli(expand(config) if isinstance(config, list) else config, run=False)
    return cli.trainer, cli.model, cli.datamodule  # type: ignore[return-value]


def _cli(args: dict[str, Any] | list[str], run: bool) -> AmtCLI:
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    named = named_model(args)
    AmtCLI.objective = DEFAULT_OBJECTIVE if named is None else objective_named(named)
    return AmtCLI(
        model_class=pl.LightningModule,
        datamodule_class=pl.LightningDataModule,
        trainer_class=Trainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveRunConfig,
        parser_kwargs={"prog": "amt"},
        seed_everything_default=0,
        parser_class=AmtParser,
        auto_configure_optimizers=False,
        args=args,
        run=run,
    )
