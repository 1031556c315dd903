"""`amt verify`: the command line of `verification/`.

amt verify --config run.yaml --strategy fsdp2_tp:tp=2
amt verify --model org/name --data chats.jsonl --strategy fsdp2:cp=2 --json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from automodel_trainer.data.adapt import as_datamodule
from automodel_trainer.lightning_cli import build
from automodel_trainer.modules import HuggingFaceModule, objective_named
from automodel_trainer.trainer import Trainer
from automodel_trainer.verification.ranks import Processes
from automodel_trainer.verification.verify import LENGTH, verify

_EXIT_CODES = (
    "Exit code: 0 the same numbers as one device; 1 other numbers; 3 undecided: at every attempt rounding decided what "
    "a router chose. (2 means that an argument is unknown.)"
)
_CONFIG_KEYS = ("seed_everything", "model", "data")


def main(argv: Sequence[str]) -> None:
    """The command line. The exit code is 0 for the same numbers, 1 for other numbers, 3 if that stays undecided."""
    parser = argparse.ArgumentParser(
        prog="amt verify",
        description="Compare a layout with one device, on your model and your data. A small copy of "
        "the model trains for three steps on one device and on the layout, and everything is compared.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument(
        "--config", help="a run's YAML: its model and data, and its strategy unless --strategy is given"
    )
    parser.add_argument("--model", help="a model folder or Hub id, in place of --config")
    parser.add_argument("--data", help="a data set, with --model")
    parser.add_argument("--strategy", help="the layout, for example fsdp2_tp:tp=2 or fsdp2:cp=2")
    parser.add_argument("--devices", type=int, help="ranks; default: as few as the layout's sizes allow")
    parser.add_argument("--seq-len", type=int, default=LENGTH, help=f"tokens of a row (default {LENGTH})")
    parser.add_argument("--full", action="store_true", help="run on this machine's GPUs, not on the CPU")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(list(argv))
    module, data, strategy = _from_arguments(args)
    launch = None if args.full else Processes("fork")  # nothing has run backward here: ranks start at once
    report = verify(module, data, strategy, args.devices, full=args.full, length=args.seq_len, launch=launch)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        report.print()
    raise SystemExit(report.exit_code)


def _from_arguments(args: argparse.Namespace) -> tuple[HuggingFaceModule, Any, Any]:
    if bool(args.config) == bool(args.model):
        raise ValueError("Give amt verify --config run.yaml, or --model and --data.")
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "") if args.full else ""
    if args.config:
        trainer, module, data = _from_yaml(Path(args.config))
        strategy = args.strategy or trainer.strategy
    else:
        if not args.data:
            raise ValueError("amt verify --model also needs --data.")
        module = objective_named(args.model)(args.model)
        datamodule, loader = as_datamodule(args.data, kind=module.data_class)
        data, strategy = datamodule or loader, args.strategy or "fsdp2"
    if not isinstance(module, HuggingFaceModule):
        raise ValueError(
            "amt verify runs an objective of this project (CausalLMModule, or another subclass of HuggingFaceModule), "
            f"not {type(module).__name__}."
        )
    return module, with_tokenizer(data, module), strategy


def with_tokenizer(data: Any, module: HuggingFaceModule) -> Any:
    """A data module without a tokenizer takes the model's, as in `fit`."""
    if getattr(data, "tokenizer", 0) is None:
        data.tokenizer = module.tokenizer
    return data


def _from_yaml(path: Path) -> tuple[Trainer, Any, Any]:
    """Trainer (for its strategy), module and data that a run's configuration describes."""
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file.")
    config = yaml.safe_load(path.read_text())
    run = {key: config[key] for key in _CONFIG_KEYS if key in config}
    strategy = (config.get("trainer") or {}).get("strategy", "auto")
    run["trainer"] = {"strategy": strategy, "accelerator": "cpu", "devices": 1, "logger": False}
    return build(run)
