"""The reference pages: names from `__all__`, commands from their parsers, options of YAML from the classes."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import re
from typing import Any

from automodel_trainer import cli, cli_help

# Page → the package whose `__all__` it lists, and what the page says first.
PACKAGES = {
    "trainer": ("automodel_trainer", "What a script imports. Names of the other pages are linked."),
    "strategies": ("automodel_trainer.strategies", "How a model lies on devices."),
    "callbacks": ("automodel_trainer.callbacks", "What runs around the steps."),
    "data": ("automodel_trainer.data", "What a model is fed."),
    "modules": ("automodel_trainer.modules", "What is learned."),
    "lora": ("automodel_trainer.models.lora", "Adapters."),
    "kernels": ("automodel_trainer.models.kernels", "What the parts of a model compute with."),
    "checkpoint": ("automodel_trainer.checkpoint", "Training state in folders."),
    "verification": ("automodel_trainer.verification.report", "What `Trainer.verify` returns."),
}
WITHOUT_ALL = {"automodel_trainer.verification.report": ["Report", "Quantity"]}
YAML_CLASSES = {
    "TextDataModule": "automodel_trainer.TextDataModule",
    "TokenDataModule": "automodel_trainer.TokenDataModule",
    "ImageTextDataModule": "automodel_trainer.ImageTextDataModule",
    "MockDataModule": "automodel_trainer.MockDataModule",
    "ImageTextModule": "automodel_trainer.ImageTextModule",
    "DCPCheckpoint": "automodel_trainer.callbacks.DCPCheckpoint",
    "HFExport": "automodel_trainer.callbacks.HFExport",
    "SampleGenerations": "automodel_trainer.callbacks.SampleGenerations",
    "BatchPreview": "automodel_trainer.callbacks.BatchPreview",
    "MoELoad": "automodel_trainer.callbacks.MoELoad",
    "Preemption": "automodel_trainer.callbacks.Preemption",
    "Watchdog": "automodel_trainer.callbacks.Watchdog",
    "FSDP2Strategy": "automodel_trainer.strategies.FSDP2Strategy",
    "FaultTolerantStrategy": "automodel_trainer.strategies.FaultTolerantStrategy",
    "DDPStrategy": "automodel_trainer.strategies.DDPStrategy",
    "Parallel3DStrategy": "automodel_trainer.strategies.Parallel3DStrategy",
    "MegatronFSDPStrategy": "automodel_trainer.strategies.MegatronFSDPStrategy",
}


def pages() -> dict[str, str]:
    """Markdown of each page, by its path in the site.

    Raises:
        ValueError: a public name has no docstring.
    """
    homes: dict[str, str] = {}
    for page, (package, _) in reversed(PACKAGES.items()):
        homes |= {_path(package, name): homes.get(_path(package, name), page) for name in _public(package)}
    found = {f"api/{page}.md": _api(page, package, about, homes) for page, (package, about) in PACKAGES.items()}
    return {**found, "cli.md": _commands(), "yaml.md": _options()}


def _public(package: str) -> list[str]:
    return WITHOUT_ALL.get(package) or list(importlib.import_module(package).__all__)


def _thing(package: str, name: str) -> Any:
    return getattr(importlib.import_module(package), name)


def _path(package: str, name: str) -> str:
    """Where a public name is defined; its public path if it is made while the program runs."""
    thing = _thing(package, name)
    module, qualified = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if module is None or qualified is None or not module.startswith("automodel_trainer"):
        return f"{package}.{name}"
    made = not re.search(
        rf"^(async )?(class|def) {qualified}\b", inspect.getsource(importlib.import_module(module)), re.M
    )
    return f"{package}.{name}" if made else f"{module}.{qualified}"


def _api(page: str, package: str, about: str, homes: dict[str, str]) -> str:
    parts = [f"# {package.removeprefix('automodel_trainer.')}\n\n{about}\n"]
    elsewhere = []
    for name in _public(package):
        path = _path(package, name)
        if homes[path] != page:
            elsewhere.append(f"[`{name}`]({homes[path]}.md#{path})")
        else:
            parts.append(_entry(package, name, path))
    if elsewhere:
        parts.insert(1, " · ".join(elsewhere) + "\n")
    return "\n".join(parts)


def _entry(package: str, name: str, path: str) -> str:
    thing = _thing(package, name)
    if path != f"{package}.{name}" or inspect.isfunction(thing):
        if not inspect.getdoc(thing):
            raise ValueError(f"{path} is public and has no docstring. Write one.")
        return f"## `{name}` {{ #{path} }}\n\n::: {path}\n"
    text = inspect.getdoc(thing) if inspect.isclass(thing) else f"A constant: `{_short(thing)}`."
    if not text:
        raise ValueError(f"{path} is public and has no docstring. Write one.")
    return f"## `{name}` {{ #{path} }}\n\n{text}\n"


def _short(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)


# --- commands ---------------------------------------------------------------------------------------------------------


def _commands() -> str:
    parts = [f"# Commands\n\nThis is what `amt --help` and `amt COMMAND --help` print.\n\n{_block(cli.USAGE)}"]
    for name in cli.TRAINING:
        text = cli_help.help_text(name)
        parts.append(f"## amt {name}\n\n" + (_block(text) if name == "fit" else "It takes the options of `amt fit`.\n"))
    for name, module in cli.TOOLS.items():
        parts.append(f"## amt {name}\n\n{_block(_help_of(module))}")
    return "\n".join(parts)


def _help_of(module: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    return printed.getvalue()


def _block(text: str) -> str:
    return f"```text\n{text.strip()}\n```\n"


# --- YAML -------------------------------------------------------------------------------------------------------------


def _options() -> str:
    parts = [
        "# Options in YAML\n\nEvery option of a run. `trainer.max_steps` is `max_steps:` under `trainer:`, and "
        "`--trainer.max_steps` on the command line.\n"
    ]
    for prefix, (title, kind) in cli_help.GROUPS.items():
        parts.append(f"## {prefix}: {title}\n\n{_table(cli_help.options(prefix, kind))}")
    parts.append("## By class\n\nThese are named by `class_path:`, with their options under `init_args:`.\n")
    for name, path in YAML_CLASSES.items():
        package, _, attribute = path.rpartition(".")
        parts.append(f"### {name}\n\n{_table(cli_help.options('', _thing(package, attribute)))}")
    return "\n".join(parts)


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"| `{name}` | {text.strip().replace('|', chr(92) + '|')} |" for name, text in rows]
    return "\n".join(["| option | meaning (default) |", "| --- | --- |", *lines, ""])
