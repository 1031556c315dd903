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

ROOT = Path(__file__).parents[1]


def sources() -> Iterator[str]:
    """Every file of the package, as it is imported: `strategies/` and `callbacks/` are links inside it."""
    for folder, _, files in os.walk(ROOT / "automodel_trainer", followlinks=True):
        here = Path(folder).relative_to(ROOT)
        yield from ((here / name).as_posix() for name in files if name.endswith((".py", ".typed")))


def test_a_clone_is_the_package() -> None:
    """Every folder of it is a package, and what stands beside it is linked and not copied."""
    folders = {Path(name).parent for name in sources()}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
    for name in ("strategies", "callbacks"):
        assert os.readlink(ROOT / "automodel_trainer" / name) == f"../{name}"


def test_distributions_hold_all_of_it(tmp_path: Path) -> None:
    """A wheel of a clone, and a wheel of its source distribution."""
    clone = tmp_path / "clone"
    for name in ("automodel_trainer", "strategies", "callbacks"):
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    build("sdist", clone, tmp_path)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for folder in (clone, unpacked):
        build("wheel", folder, folder / "dist")
        with zipfile.ZipFile(next((folder / "dist").glob("*.whl"))) as wheel:
            names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == set(sources())


def build(kind: str, folder: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
