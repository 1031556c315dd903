"""Look at the licences of the core dependencies and of everything that they bring: `python docs/site/licences.py`."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PERMISSIVE = re.compile(
    r"apache|\bmit\b|\bbsd\b|0bsd|3-clause|2-clause|\bisc\b|\bpsf\b|python software foundation|python-2\.0|mpl|mozilla"
    r"|unlicense|zlib|hpnd|cc0|public domain|\bmit-cmu\b",
    re.IGNORECASE,
)
COPYLEFT = re.compile(r"\b[al]?gpl|sspl|busl|proprietary|non-?commercial", re.IGNORECASE)
OF_NVIDIA = re.compile(r"nvidia|cuda", re.IGNORECASE)  # come with torch on GPUs, under NVIDIA's own terms


def closure(names: list[str]) -> dict[str, Distribution]:
    """The installed distributions that some names bring, by name; extras and other platforms are left out."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        requirement = Requirement(waiting.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found or (requirement.marker is not None and not _applies(requirement)):
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        waiting += found[name].requires or []
    return found


def _applies(requirement: Requirement) -> bool:
    assert requirement.marker is not None
    return requirement.marker.evaluate({"extra": ""})


def licence(package: Distribution) -> str:
    """What a distribution says of its licence: the expression, the classifiers, or the field."""
    about = package.metadata
    classifiers = [c for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    texts = [about.get("License-Expression"), *classifiers, (about.get("License") or "").partition("\n")[0]]
    return "; ".join(text for text in texts if text) or "none given"


def core() -> list[str]:
    """What `pip install` brings at first hand."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def refused() -> dict[str, str]:
    """Distributions of the core whose licence is not known to be permissive, with what they say."""
    packages = {name: licence(package) for name, package in closure(core()).items()}
    return {name: text for name, text in packages.items() if not permissive(name, text)}


def permissive(name: str, text: str) -> bool:
    """Whether a licence asks for no more than its text to be kept (MPL: for the package's own files)."""
    return bool(OF_NVIDIA.search(name + text) or (PERMISSIVE.search(text) and not COPYLEFT.search(text)))


if __name__ == "__main__":
    for name, package in sorted(closure(core()).items()):
        print(f"{name:<28} {package.version:<14} {licence(package)[:90]}")
    if bad := refused():
        raise SystemExit(f"Not known to be permissive: {bad}")
