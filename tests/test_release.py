"""What a release promises: floors of dependencies, licences, the table of extras, the files beside the code."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def test_lightning_is_no_bad_release() -> None:
    """2.6.2 and 2.6.3 are malicious, and versions before 2.6.6 have CVE-2026-58659."""
    allowed = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "lightning").specifier
    assert not any(version in allowed for version in ("2.5.6", "2.6.1", "2.6.2", "2.6.3", "2.6.4", "2.6.5"))
    assert "2.6.6" in allowed
    assert PINS["lightning"] in allowed
    assert PINS["lightning"] == PINS["pytorch-lightning"]


def test_pins_are_what_is_allowed() -> None:
    """Every requirement of the project and of its extras admits the version that the tests ran with."""
    names = {name.lower().replace("_", "-"): version for name, version in PINS.items()}
    asked = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, asked):
        version = names.get(requirement.name.lower().replace("_", "-"))
        assert version is None or version in requirement.specifier, requirement


def test_licences_of_the_core_are_permissive() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "site" / "licences.py"))
    assert len(script["closure"](script["core"]())) > 40
    assert script["refused"]() == {}
    permissive = script["permissive"]
    assert permissive("a", "MPL-2.0 AND MIT")
    assert permissive("nvidia-nccl-cu13", "NVIDIA Proprietary Software")
    assert not any(
        permissive("a", text) for text in ("none given", "GPL-3.0-only AND MIT", "LGPL-2.1", "MIT; Proprietary")
    )


def test_the_table_of_extras_is_complete() -> None:
    table = (ROOT / "docs" / "extras.md").read_text()
    rows = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    assert rows == PROJECT["optional-dependencies"].keys()


def test_the_citation_is_yaml() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
