"""Read the number of processes from torchrun, srun or Ray Train, so that users need not repeat it."""

from __future__ import annotations

import os
import sys
from typing import Any

from automodel_trainer.distributed.ray_worker import ray_sizes


def launched_sizes(devices: Any, num_nodes: int) -> tuple[Any, int]:
    """Fill in `devices="auto"` and `num_nodes=1` from the launcher's environment.

    Args:
        devices: the Trainer's argument; "auto" and -1 take the launcher's number of processes per node.
        num_nodes: the Trainer's argument; 1 takes the launcher's number of nodes.

    Returns:
        `devices` and `num_nodes`, unchanged if no launcher is found.

    Raises:
        ValueError: `devices` is not the number of processes that the launcher started on this node, or `num_nodes` not
            that of torchrun's nodes.
    """
    found = ray_sizes() or _torchrun() or _srun()
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
    if num_nodes not in (1, nodes) and _torchrun() is not None:
        raise ValueError(
            f"num_nodes={num_nodes}, but torchrun started ranks on {nodes} node(s). Leave num_nodes out, or give "
            f"torchrun --nnodes {num_nodes}. If it has that already, look at the clocks of the nodes: torchrun takes "
            "one whose clock is behind by more than 15 s for dead, and starts without it."
        )
    return devices, nodes if num_nodes == 1 else num_nodes


def _torchrun() -> tuple[int, int] | None:
    """Processes per node and number of nodes under torchrun; None elsewhere."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return local, int(os.environ["WORLD_SIZE"]) // local


def _srun() -> tuple[int, int] | None:
    """Processes per node and number of nodes under srun; None elsewhere, and in an interactive shell of Slurm."""
    if os.environ.get("SLURM_JOB_NAME") in (None, "bash", "interactive") or "SLURM_NTASKS" not in os.environ:
        return None
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    return int(os.environ["SLURM_NTASKS"]) // nodes, nodes


def in_notebook() -> bool:
    """Whether this is a notebook or an interactive Python session. A failing run must not end such a process."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
