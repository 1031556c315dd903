"""The page of every error: the texts of all `raise ValueError` in the source, one anchor each.

A text is shown as it is written, with … where the program puts a value.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "automodel_trainer"
GAP = "…"
HEADING, SHORT = 110, 40  # characters: the longest heading; a first sentence shorter than that says too little

# Where a message comes from → the page that it is on, and what stands above it.
PAGES = {
    "data": "Your data",
    "models": "The model, adapters, quantization, kernels",
    "modules": "Objective, optimizer, schedule",
    "strategies": "Layouts",
    "checkpoint": "Checkpoints and resume",
    "callbacks": "Callbacks",
    "tools": "Commands",
    "trainer": "The Trainer, and everything else",
}


@dataclass(frozen=True)
class Message:
    """One error.

    Attributes:
        text: with `…` for values.
        file: path inside the package.
        function: that raises it.
    """

    text: str
    file: str
    function: str

    @property
    def page(self) -> str:
        """The name of its page."""
        first = self.file.partition("/")[0]
        return first if first in PAGES else "trainer"

    @property
    def anchor(self) -> str:
        """It stays as long as the text does."""
        words = re.findall(r"[a-z0-9]+", self.text.lower())[:8]
        return "-".join([*words, hashlib.sha256(self.text.encode()).hexdigest()[:6]])

    @property
    def heading(self) -> str:
        """The first sentence, or as much of it as a line takes."""
        first, *rest = re.split(r"(?<=[.:]) ", self.text.replace("\n", " "))
        sentence = f"{first} {rest[0]}" if rest and len(first) < SHORT else first
        return sentence if len(sentence) <= HEADING else sentence[:HEADING].rsplit(" ", 1)[0] + " " + GAP


@cache
def messages() -> list[Message]:
    """Every text of a ValueError, in the order of the files; a text that is raised twice is one."""
    found: dict[str, Message] = {}
    for path, function, _, texts in _raised():
        for text in texts:
            name = function.name if function is not None else ""
            found.setdefault(text, Message(text, path.relative_to(PACKAGE).as_posix(), name))
    return list(found.values())


def passed_on() -> list[str]:
    """The expressions of errors that have no text of their own, because they pass on another's."""
    return [ast.unparse(node) for _, _, node, texts in _raised() if not texts]


def _raised() -> Iterator[tuple[Path, ast.FunctionDef | None, ast.expr, list[str]]]:
    """Of every ValueError: the file, the function, what it is called with, and the texts that this may be."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in _files()}
    everywhere = {name: node for tree in trees.values() for name, node in _functions(tree).items()}
    for path, tree in trees.items():
        names = Names({**everywhere, **_functions(tree)}, _constants(tree))
        for function, node in _raises(tree):
            yield path, function, node, _texts(node, function, names)


def _files() -> list[Path]:
    folders = [PACKAGE, *(PACKAGE / name for name in ("strategies", "callbacks"))]
    found = {path for folder in folders for path in folder.rglob("*.py")}
    return sorted(found)


def _raises(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | None, ast.expr]]:
    """What each ValueError is called with, and the innermost function around it."""

    def walk(node: ast.AST, function: ast.FunctionDef | None) -> Iterator[tuple[ast.FunctionDef | None, ast.expr]]:
        for child in ast.iter_child_nodes(node):
            inner = child if isinstance(child, ast.FunctionDef) else function
            if isinstance(child, ast.Call) and getattr(child.func, "id", "") == "ValueError" and child.args:
                yield inner, child.args[0]
            yield from walk(child, inner)

    yield from walk(tree, None)


@dataclass(frozen=True)
class Names:
    """What names in a file mean: functions, of this file or of others, and texts of the file itself."""

    functions: dict[str, ast.FunctionDef]
    texts: dict[str, str]


def _functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def _constants(tree: ast.Module) -> dict[str, str]:
    """The texts of `NAME = "…"` at the top of a file."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _texts(node: ast.expr, function: ast.FunctionDef | None, names: Names) -> list[str]:
    """The texts that an expression may be; none if it only passes on another error's."""
    if isinstance(node, ast.Name) and function is not None:
        assigned = [
            part.value
            for part in ast.walk(function)
            if (isinstance(part, ast.Assign) and any(getattr(target, "id", "") == node.id for target in part.targets))
            or (isinstance(part, ast.NamedExpr) and part.target.id == node.id)
        ]
        return [text for value in assigned for text in _texts(value, None, names)]
    if isinstance(node, ast.Call) and (helper := names.functions.get(_called(node))) is not None:
        returned = [part.value for part in ast.walk(helper) if isinstance(part, ast.Return) and part.value is not None]
        return [text for value in returned for text in _texts(value, helper, names)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        text = names.texts.get(getattr(node.func.value, "id", ""), "")
        return [re.sub(r"{\w*}", lambda _: _template(node.args[0]), text)] if text and node.args else []
    if isinstance(node, ast.IfExp):
        return _texts(node.body, function, names) + _texts(node.orelse, function, names)
    text = _template(node)
    if isinstance(node, ast.JoinedStr) and not re.search(r"\w{3,}", text):  # all words are those of a helper
        called = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
        inner = [text for value in called if isinstance(value, ast.Call) for text in _texts(value, function, names)]
        return [f"{GAP}: {text}" for text in inner]
    return [text] if re.search(r"\w{3,}", text) else []


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return re.sub(f"{GAP}+", GAP, "".join(_template(part) for part in node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return GAP


def pages() -> dict[str, str]:
    """Markdown of each page, by its path in the site."""
    groups: dict[str, list[Message]] = defaultdict(list)
    for message in messages():
        groups[message.page].append(message)
    found = {"errors/index.md": _overview(groups)}
    for name, title in PAGES.items():
        parts = [f"---\nhide: [toc]\n---\n\n# Errors: {title}\n\n{INTRODUCTION}\n"]
        parts += [_entry(message) for message in groups[name]]
        found[f"errors/{name}.md"] = "\n".join(parts)
    return found


INTRODUCTION = (
    "Each error says what was given, what is allowed, and what to do. Where the program puts a value, the text here "
    "has a …. Search for the words of yours."
)


def _overview(groups: dict[str, list[Message]]) -> str:
    total = sum(map(len, groups.values()))
    rows = [f"| [{title}]({name}.md) | {len(groups[name])} |" for name, title in PAGES.items()]
    head = f"# By error message\n\n{INTRODUCTION} There are {total} texts, each with a link of its own.\n"
    return "\n".join([head, "| about | texts |", "| --- | --- |", *rows, ""])


def _entry(message: Message) -> str:
    where = f"`{message.file}`" + (f", `{message.function}`" if message.function else "")
    text = "\n> ".join(_escaped(line) for line in message.text.splitlines())
    return f"## {_escaped(message.heading)} {{ #{message.anchor} }}\n\n> {text}\n\n{where}\n"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)
