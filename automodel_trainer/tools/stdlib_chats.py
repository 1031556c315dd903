"""A real data set that every machine with Python already has: chats made from the standard library's docstrings.

Each public module, class, function, method and property with a docstring becomes one chat: a question about it, and
an answer like in a reference work, with a heading and the first paragraph of the docstring. Training and validation
chats come from different packages. The validation loss therefore measures how well the model learned *how* to answer,
not what it memorized.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import types
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

# A fixed list, because importing these modules prints nothing, opens nothing and needs no display. A module that a
# Python version lacks is skipped.
MODULES = """
abc argparse array ast asyncio base64 bisect builtins bz2 calendar cmath cmd code codecs collections collections.abc
colorsys compileall concurrent.futures configparser contextlib contextvars copy csv ctypes dataclasses datetime decimal
difflib dis doctest email.charset email.header email.headerregistry email.message email.mime.multipart email.mime.text
email.policy email.utils enum errno faulthandler filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass
gettext glob graphlib gzip hashlib heapq hmac html html.parser http http.client http.cookiejar http.cookies http.server
imaplib importlib.abc importlib.metadata importlib.resources importlib.util inspect io ipaddress itertools json keyword
linecache locale logging logging.config logging.handlers lzma mailbox marshal math mimetypes mmap modulefinder
multiprocessing multiprocessing.connection multiprocessing.managers multiprocessing.pool multiprocessing.shared_memory
netrc numbers operator optparse os os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint
profile pstats py_compile queue quopri random re reprlib runpy sched secrets select selectors shelve shlex shutil signal
site smtplib socket socketserver sqlite3 ssl stat statistics string struct subprocess symtable sys sysconfig tabnanny
tarfile tempfile textwrap threading time timeit token tokenize tomllib trace traceback tracemalloc types typing
unicodedata unittest unittest.mock urllib.error urllib.parse urllib.request urllib.robotparser uuid venv warnings wave
weakref webbrowser wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util xml.dom.minidom xml.dom.pulldom
xml.etree.ElementTree xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client xmlrpc.server zipapp zipfile
zipimport zlib zoneinfo
""".split()  # noqa: SIM905

# Modules in C that define functions of a package, if their names do not show it.
C_TWINS = {"os": ("posix", "nt", "posixpath", "ntpath", "genericpath"), "threading": ("_thread",)}

MIN_CHARACTERS, MAX_CHARACTERS = 25, 400
VALIDATION_CHATS = 96

QUESTIONS = {
    "module": ("What is the Python module `{}` for?", "What can I do with Python's `{}` module?"),
    "class": ("What is `{}` in Python?", "What is the Python class `{}` for?", "When would I use `{}` in Python?"),
    "function": ("What does `{}` do in Python?", "Explain the Python function `{}`.", "What is `{}()` for in Python?"),
    "method": ("What does `{}` do in Python?", "Explain the Python method `{}`.", "What happens when I call `{}()`?"),
    "property": ("What does the attribute `{}` tell me in Python?", "What is `{}` in Python?"),
}

_SIGNATURE = re.compile(r"^[\w.]+\(.*\)?(\s*->.*)?$")
_PROSE = re.compile(r"""[A-Z"'`(*][\x20-\x7e]*[.!?)]""")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def build_chats(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All chats as (train, validation). Each row is `{"messages": [...], "source": "package"}`.

    The two splits share no package, and no explanation occurs twice. The result depends only on the seed and the Python
    version, unless a library replaces functions of the standard library (torch replaces two).
    """
    by_package = _chats_by_package()
    # Hold out whole packages, and only small ones, so that the validation split has many kinds of modules.
    validation: list[dict[str, Any]] = []
    held_out = set()
    for package in sorted(by_package, key=lambda name: _shuffle_key(seed, name)):
        if len(validation) < VALIDATION_CHATS and 5 <= len(by_package[package]) <= VALIDATION_CHATS // 3:
            held_out.add(package)
            validation += by_package[package]
    train = [chat for package, chats in by_package.items() if package not in held_out for chat in chats]
    for chats in (train, validation):
        chats.sort(key=lambda chat: _shuffle_key(seed, chat["messages"][0]["content"]))
    return train, validation


def _shuffle_key(seed: int, text: str) -> bytes:
    """A sort key that gives a random order, in which adding or removing a text does not move the others."""
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()


def _chats_by_package() -> dict[str, list[dict[str, Any]]]:
    seen: set[str] = set()
    chats: dict[str, list[dict[str, Any]]] = {}
    for module_name in MODULES:
        package = module_name.partition(".")[0]
        for kind, name, docstring in _documented(module_name):
            explanation = opening(docstring)
            key = re.sub(r"\W+", "", explanation).lower()
            if not explanation or key in seen:
                continue
            seen.add(key)
            phrasings = QUESTIONS[kind]
            question = phrasings[zlib.crc32(name.encode()) % len(phrasings)].format(name)
            answer = f"**{name}** ({kind})\n\n{explanation}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            chats.setdefault(package, []).append({"messages": messages, "source": package})
    return chats


def _documented(module_name: str) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, dotted name, docstring) of every public name that a module defines, in a fixed order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(module_name)
    except ImportError:  # this Python does not have the module, or was built without it
        return
    if module_name != "builtins":
        yield "module", module_name, _docstring(module)
    prefix = "" if module_name == "builtins" else f"{module_name}."
    for name, member in _public(module):
        if not _belongs_to(member, module_name):
            continue
        if inspect.isclass(member):
            yield "class", prefix + name, _docstring(member)
            for method_name, method in _public(member):
                if isinstance(method, property):
                    yield "property", f"{prefix}{name}.{method_name}", _docstring(method)
                elif inspect.isroutine(method) or isinstance(method, (classmethod, staticmethod)):
                    yield "method", f"{prefix}{name}.{method_name}", _docstring(method)
        elif inspect.isroutine(member):
            yield "function", prefix + name, _docstring(member)


def _public(namespace: types.ModuleType | type) -> list[tuple[str, Any]]:
    """The public members of a module (its `__all__` if it has one) or of a class, sorted by name."""
    listed = getattr(namespace, "__all__", None) if inspect.ismodule(namespace) else None
    members = vars(namespace)
    return [(name, members[name]) for name in sorted(listed or members) if not name.startswith("_") and name in members]


def _docstring(documented: Any) -> str:
    text = getattr(documented, "__doc__", None)
    return text if isinstance(text, str) else ""


def _belongs_to(member: Any, module_name: str) -> bool:
    """Whether the module (or its counterpart in C) defines the member, and does not import it from elsewhere."""
    home = getattr(member, "__module__", None)
    if not isinstance(home, str) or home == module_name:
        return True
    if home in MODULES:
        return False
    package = module_name.partition(".")[0]
    return home.partition(".")[0].lstrip("_") == package or home in C_TWINS.get(package, ())


def opening(docstring: str) -> str:
    """The first paragraph of a docstring on one line, if it is prose; otherwise "".

    Signature lines before it are dropped. A paragraph with more than `MAX_CHARACTERS` is cut after a sentence. Doctests
    and indented blocks (code, tables) are not prose.
    """
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = paragraph.strip("\n").splitlines()
        while lines and _SIGNATURE.match(lines[0].strip()):
            lines.pop(0)
        if lines:
            break
    else:
        return ""
    if any(line.startswith((" ", "\t", ">>>", "- ", "* ", "+", "|", "==", "--", ":")) for line in lines):
        return ""
    text = " ".join(" ".join(lines).split())
    if len(text) > MAX_CHARACTERS:
        ends = [match.end() for match in _SENTENCE_END.finditer(text) if match.end() <= MAX_CHARACTERS]
        text = text[: ends[-1]] if ends else ""
    return text if len(text) >= MIN_CHARACTERS and _PROSE.fullmatch(text) else ""
