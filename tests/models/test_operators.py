"""Compiled code that torch keeps for later runs is told apart by the code of our own operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from automodel_trainer.models import kernels, lora  # noqa: F401  they define operations
from automodel_trainer.nn import installed, operators
from automodel_trainer.strategies.base.compile import compile_blocks
from tests.tiny import tiny_model


def test_every_operation_is_noted() -> None:
    """One that is not would be known to the cache by its name alone."""
    names = {name.removeprefix("automodel_trainer::") for name in registered()}
    assert {name.partition(".")[0] for name in names} == set(operators.OPERATORS)
    assert all(Path(file).is_file() for file in operators.OPERATORS.values())


def registered() -> list[str]:
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("automodel_trainer::")]


def test_other_code_is_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = []
    file = tmp_path / "operation.py"
    with torch.compiler.config.patch(cache_key_tag="user"):
        compile_blocks(tiny_model("llama"), "eager")
        tags.append(torch.compiler.config.cache_key_tag)
        compile_blocks(tiny_model("llama"), "eager")
        assert torch.compiler.config.cache_key_tag == tags[0]
    for code in ("return x", "return 2 * x"):
        file.write_text(code)
        monkeypatch.setattr(operators, "OPERATORS", operators.OPERATORS | {"operation": str(file)})
        operators.hash_of.cache_clear()
        with torch.compiler.config.patch(cache_key_tag="user"):
            operators.key_by_operators()
            tags.append(torch.compiler.config.cache_key_tag)
    operators.hash_of.cache_clear()
    assert len(set(tags)) == 3
    assert all(tag.startswith("user ") for tag in tags)


def test_another_version_of_a_library_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers, torchao and others define operations, too."""
    tags = []
    for version in ("1.0", "1.1", "1.0"):
        monkeypatch.setattr(installed, "version", lambda name, now=version: now if name == "torchao" else "0")
        installed.installed_versions.cache_clear()
        with torch.compiler.config.patch(cache_key_tag=""):
            operators.key_by_operators()
            tags.append(torch.compiler.config.cache_key_tag)
    installed.installed_versions.cache_clear()
    assert tags[0] == tags[2] != tags[1]
