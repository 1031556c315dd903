"""Imports without a look for garbage, neither while they go on nor afterwards, and packages that have no bytecode."""

from __future__ import annotations

import importlib
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from automodel_trainer import imports

CODE = """
import gc
from automodel_trainer.imports import importing

seen, kept = [], []
with importing():
    gc.callbacks.append(lambda *found: seen.append(found))
    kept += [[] for _ in range(100_000)]
kept += [[] for _ in range(100)]
assert gc.isenabled() and not seen, seen
assert any(found is kept[0] for found in gc.get_objects(generation=2))

gc.freeze()
frozen = gc.get_freeze_count()
with importing():
    kept += [[] for _ in range(100)]
assert gc.get_freeze_count() >= 0.9 * frozen > 0

gc.disable()
with importing():
    pass
assert not gc.isenabled()
"""


def test_nothing_is_looked_through() -> None:
    """In a process in which nobody has frozen anything. What a user has frozen or switched off stays so."""
    subprocess.run([sys.executable, "-c", CODE], check=True)


@pytest.mark.parametrize(("count", "by_user"), [(0, False), (375, False), (100_000, True)])
def test_python_freezes_a_few_objects_itself(monkeypatch: pytest.MonkeyPatch, count: int, by_user: bool) -> None:
    monkeypatch.setattr(imports.gc, "get_freeze_count", lambda: count)
    assert imports.user_freezes() == by_user


def test_packages_without_bytecode_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only where an import would leave no bytecode either, and only by the first rank of a machine."""
    source = tmp_path / "compiled_again" / "__init__.py"
    source.parent.mkdir()
    source.touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert imports.compiles_again("compiled_again") is None
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert imports.compiles_again("compiled_again") == tmp_path
    monkeypatch.setenv("LOCAL_RANK", "1")
    imports.say_what_compiles_again("compiled_again")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    imports.say_what_compiles_again("compiled_again")
    assert f"compileall -q -j 0 {tmp_path}" in capsys.readouterr().err
    py_compile.compile(str(source))
    assert imports.compiles_again("compiled_again") is None
    assert imports.compiles_again("a_package_that_is_not_there") is None
