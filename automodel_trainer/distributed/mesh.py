"""ParallelDims: the number of ranks on each parallel axis, and the DeviceMesh built from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from automodel_trainer.distributed._dtensor import flatten_mesh

DATA_AXES = ("dp_replicate", "dp_shard")  # ranks along these axes see different rows
SHARD_AXES = ("dp_shard", "cp")  # parameters are sharded over these axes
TOKEN_AXES = ("dp_replicate", "dp_shard", "cp")  # ranks along these axes see different tokens


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the mesh axes. `pp` is the outermost axis; neighboring ranks differ in the last one.

    Args:
        dp_replicate: number of copies of each shard (the outer axis of HSDP).
        dp_shard: ranks that one replica is sharded over; they see different rows. -1: all ranks that are left.
        cp: ranks that each sequence is split over (context parallel).
        tp: ranks that the matrices of a layer are split over (tensor parallel).
        pp: ranks that the layers are split over (pipeline parallel).

    Raises:
        ValueError: a size is not a positive number.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def axes(self) -> dict[str, int]:
        """Axis sizes by name, outermost axis first."""
        return {"pp": self.pp, **{name: size for name, size in vars(self).items() if name != "pp"}}

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1 and not (name == "dp_shard" and size == -1):
                hint = ", or -1 for all ranks that are left" if name == "dp_shard" else ""
                raise ValueError(f"{name}={size} is not a size: give a positive number of ranks{hint}.")

    def resolve(self, world_size: int) -> ParallelDims:
        """A copy with `dp_shard=-1` replaced by the number of ranks that are left.

        Raises:
            ValueError: the sizes do not multiply to `world_size`.
        """
        fixed = math.prod(size for name, size in vars(self).items() if name != "dp_shard")
        if self.dp_shard == -1 and world_size % fixed == 0:
            return replace(self, dp_shard=world_size // fixed)
        if fixed * self.dp_shard != world_size:
            given = " × ".join(f"{name}={size}" for name, size in self.axes.items() if size != 1)
            divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
            raise ValueError(
                f"{given} does not fit this run's {world_size} rank(s). The product of all sizes must be {world_size}. "
                f"Choose sizes that divide it ({divisors}; dp_shard=-1 takes what is left), or change "
                "devices/num_nodes."
            )
        return self

    def fits(self, world_size: int) -> bool:
        """Whether `resolve` takes this number of ranks."""
        try:
            self.resolve(world_size)
        except ValueError:
            return False
        return True

    def build_mesh(self, device_type: str) -> DeviceMesh:
        """Build the mesh over all ranks. Axes of size 1 are left out, except `dp_shard`.

        Call it on resolved sizes, after the process group was initialized.
        """
        assert self.dp_shard != -1, "resolve() first"
        axes = {name: size for name, size in self.axes.items() if size > 1 or name == "dp_shard"}
        return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    def describe(self) -> str:
        """The sizes as text, for example `dp_replicate 2 × dp_shard 4`."""
        return " × ".join(f"{name} {size}" for name, size in self.axes.items() if size > 1) or "one device"


def submesh(mesh: DeviceMesh, axes: tuple[str, ...]) -> DeviceMesh | None:
    """A 1-D mesh over those of the `axes` that `mesh` has; None if it has none of them."""
    names = tuple(name for name in axes if name in (mesh.mesh_dim_names or ()))
    if not names:
        return None
    return mesh[names[0]] if len(names) == 1 else flatten_mesh(mesh[names], "_".join(names))
