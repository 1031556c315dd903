"""Compare the packages of a worker with the driver's: a run is sent as Python objects."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from automodel_trainer.nn.installed import installed_versions

_PARTS = {"automodel-trainer": 3, "torch": 2, "transformers": 2, "lightning": 2}
"""How many parts of a version must agree; the build of torch (`+cpu`, `+cu130`) may differ."""


def versions() -> dict[str, str]:
    """The versions of this process: Python's and those of the packages that a run needs."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    installed = installed_versions(*_PARTS)
    for name, parts in _PARTS.items():
        found[name] = ".".join(installed.get(name, "missing").partition("+")[0].split(".")[:parts])
    return found


def check_versions(driver: Mapping[str, str], here: str) -> None:
    """Compare the driver's versions with this process's.

    Args:
        driver: `versions()` of the driver.
        here: the name of this machine.

    Raises:
        ValueError: a package differs.
    """
    own = versions()
    differ = [f"{name} {own.get(name)} (driver: {there})" for name, there in driver.items() if own.get(name) != there]
    if differ:
        raise ValueError(
            f"The worker on {here} has other versions than the driver: {', '.join(differ)}. Install the same on all "
            "machines of the cluster, or start the run in the cluster's own environment."
        )
