"""ParallelDims: how many ranks each axis of parallelism gets, and the DeviceMesh that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the mesh axes.

    Args:
        dp_replicate: ranks that hold copies of the same shard (the outer axis of HSDP, the only one of DDP).
        dp_shard: ranks that a replica's parameters are sharded over; -1 takes what the world leaves.
    """

    dp_replicate: int = 1
    dp_shard: int = -1

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1 and not (name == "dp_shard" and size == -1):
                raise ValueError(f"{name}={size} is not a size: give a positive number of ranks" + self._hint(name))

    @staticmethod
    def _hint(name: str) -> str:
        return ", or -1 for all that are left." if name == "dp_shard" else "."

    def resolve(self, world_size: int) -> ParallelDims:
        """These sizes with `dp_shard=-1` filled in.

        Raises:
            ValueError: the sizes do not multiply to `world_size`.
        """
        if self.dp_shard != -1:
            resolved = self
        elif world_size % self.dp_replicate == 0:
            resolved = ParallelDims(self.dp_replicate, world_size // self.dp_replicate)
        else:
            raise ValueError(
                f"dp_replicate={self.dp_replicate} does not divide the {world_size} rank(s) of this run. "
                f"Sizes that do: {_divisors(world_size)}."
            )
        if resolved.dp_replicate * resolved.dp_shard != world_size:
            raise ValueError(
                f"dp_replicate={resolved.dp_replicate} × dp_shard={resolved.dp_shard} = "
                f"{resolved.dp_replicate * resolved.dp_shard}, but this run has {world_size} rank(s). "
                f"Give sizes whose product is {world_size} (dp_shard=-1 takes the rest), or change devices/num_nodes."
            )
        return resolved

    def build_mesh(self, device_type: str) -> DeviceMesh:
        """A mesh over the world; axes of size 1 are left out, except `dp_shard`, which is always there.

        Must be called on resolved sizes, after the process group exists.
        """
        assert self.dp_shard != -1, "resolve() first"
        axes = {name: size for name, size in vars(self).items() if size > 1 or name == "dp_shard"}
        return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    def describe(self) -> str:
        """For example `dp_replicate 2 × dp_shard 4`."""
        return " × ".join(f"{name} {size}" for name, size in vars(self).items() if size > 1) or "one device"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
