"""The rules of the house: imports go down, private names stay in `_*.py` files, pages name files that exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Any

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "automodel_trainer"

MAX_LINES = 500


def sources() -> dict[str, str]:
    """Every Python file of the package, by its path inside it. The links to strategies and callbacks are followed."""
    found = {}
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder) / name
                found[path.relative_to(PACKAGE).as_posix()] = path.read_text(encoding="utf-8")
    return found


SOURCES = sources()


# --- imports go down --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "planted"),
    [
        (None, ""),
        ("automodel_trainer/nn/blocks.py", "automodel_trainer.strategies.base.clip"),
        ("strategies/base/clip.py", "automodel_trainer.strategies.tensor.plan"),
        ("automodel_trainer/models/files.py", "automodel_trainer.models.lora.config"),
        ("callbacks/console.py", "automodel_trainer.callbacks.ledger"),
    ],
)
def test_import_contracts(file: str | None, planted: str, tmp_path: Path) -> None:
    """They hold, and break on an import that looks up or closes a cycle, even inside a function and through a link."""
    for name in ("automodel_trainer", "strategies", "callbacks"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if file is not None:
        with (tmp_path / file).open("a") as stream:
            stream.write(f"\n\ndef planted() -> None:\n    import {planted}\n")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-logo", "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (file is None), done.stdout + done.stderr


def test_no_file_imports_itself_through_others() -> None:
    """A stricter rule than the contract's: a package's own `__init__` counts as a file."""
    graph = grimp.build_graph("automodel_trainer", cache_dir=None)
    files = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(files).prepare()


def test_the_picture_is_of_this_code() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "package_graph.py"))
    assert script["draw"]() == script["PICTURE"].read_text(encoding="utf-8"), "`make pictures` draws it again"


# --- private names of dependencies ------------------------------------------------------------------------------------

DEPENDENCIES = {
    "accelerate", "bitsandbytes", "datasets", "jsonargparse", "liger_kernel", "lightning", "megatron_fsdp", "peft",
    "safetensors", "torch", "torchao", "torchmetrics", "transformer_engine", "transformers",
}  # fmt: skip
STANDARD_LIBRARY = {"_asdict", "_current_frames", "_exit", "_fields", "_replace"}
PRIVATE_HERE = {"_training_data"}  # looked up by `getattr`, and defined by this package


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def up_to_private(path: str) -> str | None:
    """`torch.a._b.c` as `torch.a._b`; None if no part of it is private."""
    parts = path.split(".")
    place = next((index for index, part in enumerate(parts) if is_private(part)), None)
    return None if place is None else ".".join(parts[: place + 1])


def defined_names() -> set[str]:
    """Every name that the package itself gives to a function, class, attribute, variable or argument."""
    names = set()
    for text in SOURCES.values():
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    names.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
                case ast.arg(arg=name):
                    names.add(name)
    return names


def private_names(text: str, own: set[str]) -> Iterator[str]:
    """Private names of dependencies in a file: imported, reached from an imported name, or of nobody in the package."""
    imported: dict[str, str] = {}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        paths: list[tuple[str, str]] = []
        if isinstance(node, ast.Import):
            paths = [(alias.asname or alias.name.partition(".")[0], alias.name) for alias in node.names]
            imported |= {name: path if name in path.split(".")[-1] else name for name, path in paths}
        elif isinstance(node, ast.ImportFrom) and node.module:
            paths = [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
            imported |= dict(paths)
        for _, path in paths:
            if path.partition(".")[0] in DEPENDENCIES and (found := up_to_private(path)):
                yield found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            home = imported.get(owner.partition(".")[0], "")
            if home.partition(".")[0] in DEPENDENCIES and re.fullmatch(r"[\w.]+", owner):
                yield f"{owner}.{node.attr}"
            elif node.attr not in own | STANDARD_LIBRARY:
                yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            for argument in node.args[1:2]:
                name = str(argument.value) if isinstance(argument, ast.Constant) else ""
                if is_private(name) and name not in PRIVATE_HERE:
                    yield name


def test_private_names_of_dependencies_stay_in_their_files() -> None:
    own = defined_names()
    found = set()
    for file, text in SOURCES.items():
        name = Path(file).name
        if not name.startswith("_") or name in ("__init__.py", "__main__.py"):
            found |= {(file, private) for private in private_names(text, own)}
    assert not found, f"Move these into a `_*.py` file of their package: {sorted(found)}"


def test_the_search_for_private_names_finds_them() -> None:
    text = """
import torch, torch.distributed as dist
from torch.utils import _pytree
from torch._subclasses.fake_tensor import FakeTensorMode
def f(x, self):
    torch._foreach_norm(x); dist._functional(x); x._local_tensor; self._ours; x.public; getattr(x, "_hidden", None)
    x._fields
"""
    assert set(private_names(text, {"_ours"})) == {
        "torch.utils._pytree", "torch._subclasses", "torch._foreach_norm", "dist._functional", "_local_tensor",
        "_hidden",
    }  # fmt: skip


# --- files, names, docstrings -----------------------------------------------------------------------------------------

FAMILIES = re.compile(
    r"\b(llama|qwen|gemma|mistral|mixtral|phi-?\d|gpt_?-?(2|neox|oss|j)|deepseek|falcon|smollm|olmo|lfm|granite|bloom|glm"
    r"|bert|mamba(?![_-]))\w*",  # `mamba_…` are fields of configs, and mamba-ssm is a package
    re.IGNORECASE,
)


def test_no_model_family_is_named_in_the_core() -> None:
    """Layouts come from what a model declares. The quickstarts have a model, a paper its title, a library its names."""
    found = []
    for file, text in SOURCES.items():
        if not file.endswith("quickstart.py") and not Path(file).name.startswith("_"):
            lines = [line for line in text.splitlines() if "arXiv" not in line]
            found += [(file, match.group()) for line in lines for match in FAMILIES.finditer(line)]
    assert not found


def test_files_are_short() -> None:
    lengths = {file: len(text.splitlines()) for file, text in SOURCES.items()}
    assert {file: length for file, length in lengths.items() if length > MAX_LINES} == {}


def test_every_file_has_a_docstring() -> None:
    without = {file for file, text in SOURCES.items() if not ast.get_docstring(ast.parse(text))}
    assert not without


def undocumented(module: ModuleType) -> Iterator[str]:
    """Public functions, classes and methods of a module without a docstring; what overrides inherits its base's."""
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing) and not thing.__doc__:
            yield f"{module.__name__}.{name}"
        if inspect.isclass(thing):
            if (thing.__dict__.get("__doc__") or f"{name}(").startswith(f"{name}("):  # what a dataclass makes up
                yield f"{module.__name__}.{name}"
            yield from (f"{module.__name__}.{name}.{member}" for member in undocumented_members(thing))


def undocumented_members(cls: type) -> Iterator[str]:
    for name, member in vars(cls).items():
        inherited = any(name in base.__dict__ for base in cls.__mro__[1:])
        if not name.startswith("_") and not inherited and is_documentable(member) and not member.__doc__:
            yield name


def is_documentable(member: Any) -> bool:
    return inspect.isfunction(member) or isinstance(member, (property, staticmethod, classmethod))


def test_public_names_have_docstrings() -> None:
    found = set()
    for file in SOURCES:
        if file != "__main__.py":
            name = "automodel_trainer." + file.removesuffix(".py").replace("/", ".")
            try:
                module = importlib.import_module(name.removesuffix(".__init__"))
            except ModuleNotFoundError as error:
                if error.name not in ("triton", "torchft"):  # `make venv` puts them where only their tests find them
                    raise
                continue
            found |= set(undocumented(module))
    assert not found


# --- the pages --------------------------------------------------------------------------------------------------------

FRONT = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "site")
PAGES = [*FRONT, *(path.relative_to(ROOT).as_posix() for path in DOCS)]
MADE_BY_THE_SITE = re.compile(r"docs/(choose|cli|yaml)\.md|docs/(errors|api)/\w+\.md")
MADE_BY_RUNS = {"config.yaml"}


def named_files(page: str) -> Iterator[Path]:
    """The files that a page links to, or names between backticks outside of code blocks."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            yield (ROOT / page).parent / target
    for name in re.findall(r"`([\w./-]+\.(?:py|md|yaml|toml|txt|svg|png))`", text):
        first, slash, _ = name.partition("/")
        in_a_folder = (ROOT / first).is_dir() or (PACKAGE / first).is_dir()
        if in_a_folder if slash else page in FRONT and name not in MADE_BY_RUNS:
            yield ROOT / name if (ROOT / name).exists() else PACKAGE / name


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_pages_exist(page: str) -> None:
    files = {path.resolve() for path in named_files(page)}
    missing = {path.relative_to(ROOT).as_posix() for path in files if not path.exists()}
    assert not {name for name in missing if not MADE_BY_THE_SITE.fullmatch(name)}
