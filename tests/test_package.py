"""What users install holds every package of the repository, and nothing of another name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def sources() -> Iterator[str]:
    """Every file of the package, as it is imported: `strategies/` and `callbacks/` are links inside it."""
    for folder, _, files in os.walk(ROOT / "automodel_trainer", followlinks=True):
        here = Path(folder).relative_to(ROOT)
        yield from ((here / name).as_posix() for name in files if name.endswith((".py", ".typed", ".txt")))


def test_a_clone_is_the_package() -> None:
    """Every folder of it is a package, and what stands beside it is linked and not copied."""
    folders = {Path(name).parent for name in sources()}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
    for name in ("strategies", "callbacks"):
        assert os.readlink(ROOT / "automodel_trainer" / name) == f"../{name}"


def test_distributions_hold_all_of_it(tmp_path: Path) -> None:
    """A wheel of a clone, and a wheel of its source distribution."""
    clone = copy_of_the_repository(tmp_path / "clone")
    for folder in (clone, unpacked_sdist(clone, tmp_path)):
        assert files_of(wheel_of(folder)) == set(sources())


def test_the_version_is_the_tag(tmp_path: Path) -> None:
    """Of a clone and of its source distribution. Git names the links too, and they must not be packed as files."""
    pytest.importorskip("setuptools_scm")
    clone = copy_of_the_repository(tmp_path / "clone")
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "core.symlinks=true")
    for command in (["init"], ["add", "--all"], ["commit", "-m", "all"], ["tag", "v7.8.9"]):
        subprocess.run(["git", *identity, *command], cwd=clone, check=True, capture_output=True)
    for folder in (clone, unpacked_sdist(clone, tmp_path)):
        wheel = wheel_of(folder)
        assert wheel.name.startswith("automodel_trainer-7.8.9-")
        assert files_of(wheel) == set(sources())


def copy_of_the_repository(folder: Path) -> Path:
    """Only what a build needs, and no git repository."""
    for name in ("automodel_trainer", "strategies", "callbacks"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def unpacked_sdist(folder: Path, work: Path) -> Path:
    build("sdist", folder, work)
    with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    return unpacked


def wheel_of(folder: Path) -> Path:
    build("wheel", folder, folder / "dist")
    return next((folder / "dist").glob("*.whl"))


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def build(kind: str, folder: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
