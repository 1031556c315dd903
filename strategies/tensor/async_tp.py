"""Async tensor parallel: the gathers and scatters at the edges of cut layers overlap with the matmuls next to them.

The compiler does this. It fuses a gather with the matmuls that read it, or a matmul with the scatter of its output,
into one operation that works chunk by chunk over symmetric memory.

Source: torch's `_inductor/fx_passes/micro_pipeline_tp.py`.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from automodel_trainer.distributed._dtensor import overlap_matmuls_with_collectives


def enable_async_tp(mesh: DeviceMesh | None, device: torch.device, *, compiled: bool, sequence_parallel: bool) -> None:
    """Let code compiled from now on overlap the collectives of the tp mesh with matmuls.

    Args:
        mesh: the 1-D tp mesh; None: tp is 1.
        device: this rank's device.
        compiled: whether this run compiles blocks.
        sequence_parallel: whether sequence parallel is on; without it there are no gathers and scatters.

    Raises:
        ValueError: something that async tp needs is missing; the message lists it.
    """
    missing = []
    if mesh is None:
        missing.append("tp > 1 (it is 1)")
    if device.type != "cuda":
        missing.append(f"GPUs that can access each other's memory (this run is on {device.type})")
    if not compiled:
        missing.append("compile=True")
    if not sequence_parallel:
        missing.append("sequence_parallel=True")
    if missing:
        raise ValueError(f"async_tp=True needs {' and '.join(missing)}. Change these options, or set async_tp=False.")
    assert mesh is not None
    overlap_matmuls_with_collectives(mesh.get_group())
