"""The mesh of experts: the run's ranks, seen another way.

Expert parallel has no axis of its own in the run's mesh. It borrows the ranks of dp_shard × cp × tp, which are
neighbours, and splits them into efsdp × ep. Ranks along `ep` hold different experts. Ranks along `efsdp` hold different
parts of the same experts, as FSDP2 shards them. Every rank still has the rows that the run's mesh gives it.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from automodel_trainer.distributed.mesh import ParallelDims


def expert_mesh(dims: ParallelDims, ep: int, device_type: str) -> DeviceMesh:
    """The mesh (pp, dp_replicate, efsdp, ep) over all ranks; pp and dp_replicate only where they are above 1.

    Args:
        dims: the resolved sizes of the run.
        ep: number of ranks that the experts of a layer are split over; it divides dp_shard · cp · tp.
    """
    inner = dims.dp_shard * dims.cp * dims.tp
    assert inner % ep == 0, "check_ep() first"
    axes = {"pp": dims.pp, "dp_replicate": dims.dp_replicate, "efsdp": inner // ep, "ep": ep}
    axes = {name: size for name, size in axes.items() if size > 1 or name in ("efsdp", "ep")}
    return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def expert_shard_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The part of `expert_mesh` that FSDP2 shards experts over; with dp_replicate the 2-D mesh (replicate, shard)."""
    return mesh["dp_replicate", "efsdp"] if "dp_replicate" in (mesh.mesh_dim_names or ()) else mesh["efsdp"]
