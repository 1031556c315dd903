"""What users install holds every package of the repository."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"automodel_trainer.strategies": "strategies", "automodel_trainer.callbacks": "callbacks"}
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("automodel_trainer/**/__init__.py")}
    for name, folder in folders.items():
        files = (ROOT / folder).rglob("__init__.py")
        found |= {".".join([name, *file.parent.relative_to(ROOT / folder).parts]) for file in files}
    assert set(setuptools["packages"]) == found
