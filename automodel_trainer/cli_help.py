"""`amt fit --help`: the options of the default module and data, grouped, the most used first."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from automodel_trainer.data import ChatDataModule
from automodel_trainer.models.kernels import KernelsConfig
from automodel_trainer.models.lora import LoRAConfig
from automodel_trainer.modules import DEFAULT_OBJECTIVE, HuggingFaceModule, OptimizerConfig, SchedulerConfig
from automodel_trainer.short_options import ABOUT, SHORT
from automodel_trainer.trainer import Trainer

# Of each group the options that most runs set, first.
_FIRST = {
    "model": ("model", "lora", "lr", "optimizer", "scheduler"),
    "data": ("train", "validation", "val_split", "seq_len", "micro_batch_size", "global_batch_size", "loss_on"),
    "trainer": (
        "strategy", "devices", "precision", "max_epochs", "max_steps", "default_root_dir", "accumulate_grad_batches",
        "gradient_clip_val", "log_every_n_steps", "val_check_interval", "callbacks", "logger", "max_time", "num_nodes",
    ),
}  # fmt: skip
GROUPS: dict[str, tuple[str, Any]] = {
    "model": (f"the model ({DEFAULT_OBJECTIVE.__name__})", HuggingFaceModule),
    "model.lora": ("adapters", LoRAConfig),
    "model.optimizer": ("the optimizer", OptimizerConfig),
    "model.scheduler": ("the schedule", SchedulerConfig),
    "data": ("the data (ChatDataModule)", ChatDataModule),
    "trainer": ("the Trainer", Trainer),
    "model.kernels": ("kernels", KernelsConfig),
}
"""Maps the prefix of a group of options to its title and the class that takes them."""
_WIDTH = 118


def help_text(command: str) -> str:
    """The help of `fit`, `validate`, `test` or `predict`."""
    lines = [f"usage: amt {command} [--config FILE.yaml] [options]", ""]
    lines += [f"  amt {command} --model org/name --data chats.jsonl" + (" --lora 16" if command == "fit" else ""), ""]
    lines += ["In short (each stands for the option behind it)"]
    lines += [_row(f"--{name}", f"{ABOUT[name]} (--{SHORT[name]})") for name in SHORT]
    lines += ["", "Of every run"]
    lines += [
        _row("--config", "a YAML file with these options; several are merged, and options after it win"),
        _row("--ckpt_path", "a checkpoint: a folder, a URL, last, best, last-whole or auto"),
    ]
    if command == "fit":
        lines += [
            _row("--resume", "what to take from it: all, data or weights (docs/resume.md)"),
            _row("--on", "run on the workers of a cluster: ray, or ray://HOST:PORT (docs/guides/ray.md)"),
            _row("--workers", "with --on, how many, one GPU each: 8, or 4-8 for a run that is resized"),
        ]
    lines += [
        _row("--seed_everything", "the seed of all random generators (0)"),
        _row("--print_config", "print the whole configuration and exit"),
        _row("--help-all", "every option, with its type, as the parser lists them"),
    ]
    for prefix, (title, kind) in GROUPS.items():
        lines += ["", title[0].upper() + title[1:]]
        lines += [_row(f"--{prefix}.{name}", text) for name, text in options(prefix, kind)]
    lines += [
        "",
        "Another module or data: --model my_package.MyModule, --data TextDataModule; then --model.help CLASS lists its",
        "options.",
    ]
    return "\n".join(lines) + "\n"


def options(prefix: str, kind: type) -> list[tuple[str, str]]:
    """Names and texts of the options of a class, the most used first.

    Args:
        prefix: of the options, a key of `GROUPS`; another one gives the order of the class.
        kind: the class; its docstring documents the options.
    """
    defaults = _defaults(kind)
    about: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("automodel_trainer."):
            about |= _documented(base)
    first = [name for name in _FIRST.get(prefix, ()) if name in defaults]
    names = first + [name for name in defaults if name not in first]
    return [(name, about.get(name, "as Lightning has it") + _default(defaults[name])) for name in names]


def _defaults(kind: type) -> dict[str, Any]:
    """The arguments of a class and their defaults; a default that is made anew for each object is not shown."""
    if is_dataclass(kind):
        return {field.name: None if field.default is MISSING else field.default for field in fields(kind)}
    parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    return {name: parameter.default for name, parameter in parameters.items() if name not in ("self", "kwargs")}


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return " (required)"
    if isinstance(value, bool):
        return f" ({str(value).lower()})"
    return f" ({value})" if isinstance(value, (int, float, str)) and value != "" else ""


def _documented(kind: type) -> dict[str, str]:
    """The text of each argument in the `Args:` section of a docstring."""
    text = inspect.getdoc(kind) or ""
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", text, re.M)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section[1].splitlines() if section else []:
        entry = re.match(r"[ ]{4}([\w, ]+): (.*)", line)
        if entry:
            names = [name.strip() for name in entry[1].split(",")]
            found |= dict.fromkeys(names, entry[2])
        else:
            for name in names:
                found[name] = f"{found[name]} {line.strip()}"
    return found


def _row(option: str, text: str) -> str:
    return textwrap.fill(
        text.strip().rstrip("."), _WIDTH, initial_indent=f"  {option:<34} ", subsequent_indent=" " * 37
    )
