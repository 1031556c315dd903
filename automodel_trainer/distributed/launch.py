"""What torchrun or srun has already decided about processes, so that nobody has to say it twice."""

from __future__ import annotations

import os
import sys
from typing import Any


def launched_sizes(devices: Any, num_nodes: int) -> tuple[Any, int]:
    """`devices` and `num_nodes` with `"auto"` and 1 filled in from the launcher's environment.

    Raises:
        ValueError: torchrun started another number of processes than `devices` asks for.
    """
    found = _torchrun() or _srun()
    if found is None:
        return devices, num_nodes
    local, nodes = found
    if devices in ("auto", -1, "-1"):
        devices = local
    elif isinstance(devices, int) and devices != local:
        raise ValueError(
            f"devices={devices}, but the launcher started {local} process(es) on this node. Leave devices out, or give "
            f"the launcher {devices} (torchrun --nproc-per-node {devices})."
        )
    return devices, nodes if num_nodes == 1 else num_nodes


def _torchrun() -> tuple[int, int] | None:
    """Processes per node and nodes, under torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return local, int(os.environ["WORLD_SIZE"]) // local


def _srun() -> tuple[int, int] | None:
    """The same under srun; an interactive shell inside an allocation has launched nothing."""
    if os.environ.get("SLURM_JOB_NAME") in (None, "bash", "interactive") or "SLURM_NTASKS" not in os.environ:
        return None
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    return int(os.environ["SLURM_NTASKS"]) // nodes, nodes


def in_notebook() -> bool:
    """Whether this is an interactive session, which a run must not take down with it."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
