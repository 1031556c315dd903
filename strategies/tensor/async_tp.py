"""Async tensor parallel: the gathers and scatters at the edges of cut layers overlap with the matmuls beside them.

The compiler does it: it takes a gather and the matmuls that read it, or a matmul and the scatter of its output, for one
operation that works chunk by chunk over symmetric memory. Source: torch's `_inductor/fx_passes/micro_pipeline_tp.py`.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from automodel_trainer.distributed._dtensor import overlap_matmuls_with_collectives


def enable_async_tp(mesh: DeviceMesh | None, device: torch.device, *, compiled: bool, sequence_parallel: bool) -> None:
    """Let what is compiled from now on overlap collectives of the tp `mesh` (None: there is none) with matmuls.

    Raises:
        ValueError: there is nothing to overlap, or nobody who could.
    """
    missing = []
    if mesh is None:
        missing.append("tp > 1 (it is 1)")
    if device.type != "cuda":
        missing.append(f"GPUs that reach each other's memory (this run is on {device.type})")
    if not compiled:
        missing.append("compile=True")
    if not sequence_parallel:
        missing.append("sequence_parallel=True")
    if missing:
        raise ValueError(f"async_tp=True needs {' and '.join(missing)}. Change that, or set async_tp=False.")
    assert mesh is not None
    overlap_matmuls_with_collectives(mesh.get_group())
