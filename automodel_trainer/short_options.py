"""The short form of `amt fit`: `amt fit --model org/name --data chats.jsonl --lora 16`, made into the long one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

SHORT = {
    "model": "model.model",
    "data": "data.train",
    "lora": "model.lora.rank",
    "lr": "model.lr",
    "epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "batch-size": "data.global_batch_size",
    "seq-len": "data.seq_len",
    "strategy": "trainer.strategy",
    "devices": "trainer.devices",
    "precision": "trainer.precision",
    "output": "trainer.default_root_dir",
}
"""Maps short options to the options that they stand for."""

ABOUT = {
    "model": "a Hub id or folder",
    "data": "chats or instructions: a file, folder or Hub id",
    "lora": "train adapters of this rank instead of the whole model",
    "lr": "the highest learning rate",
    "epochs": "passes over the data",
    "steps": "optimizer steps",
    "batch-size": "rows per optimizer step, over all devices",
    "seq-len": "tokens per row",
    "strategy": "the layout: auto, ddp, fsdp2, hsdp, fsdp2_tp, …",
    "devices": "processes, one for each device",
    "precision": "fp32, bf16, …",
    "output": "the folder of the run",
}

_OWN = ("model", "data")  # also options of LightningCLI, which take a class, a mapping or a YAML file
_CLASS = re.compile(r"[A-Z]\w*|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\.[A-Z]\w*")  # ChatDataModule, my_package.MyModule


def expand(argv: list[str]) -> list[str]:
    """The arguments with every short option in its long form. `--name value` and `--name=value` are both known."""
    return list(_expanded(argv))


def _expanded(argv: list[str]) -> Iterator[str]:
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in SHORT:
            yield word
            continue
        if not equals:
            value = next(rest, "")
        long = name if name in _OWN and _names_a_class(value) else SHORT[name]
        yield f"--{long}={value}"


def named_model(args: dict[str, Any] | list[str]) -> str | None:
    """The folder or Hub id of the model that a configuration names; None if it names none.

    Args:
        args: a configuration, or arguments in their long form, of which the last one counts. A `--config` is read.
    """
    if isinstance(args, dict):
        section = args.get("model")
        while isinstance(section, dict):
            section = section.get("init_args", {}).get("model") or section.get("model")
        return section if isinstance(section, str) else None
    found = None
    for word, following in pairwise([*args, ""]):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if name in ("--model.model", "--model.init_args.model"):
            found = value
        elif name in ("--config", "-c") and Path(value).is_file():
            config = yaml.safe_load(Path(value).read_text())
            found = named_model(config if isinstance(config, dict) else {}) or found
    return found


def _names_a_class(value: str) -> bool:
    """Whether a value of `--model` or `--data` is what LightningCLI takes: a class, a mapping or a YAML file."""
    return value.startswith("{") or value.endswith((".yaml", ".yml")) or _CLASS.fullmatch(value) is not None
