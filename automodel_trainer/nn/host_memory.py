"""How much memory of the host is free for this process."""

from __future__ import annotations

from pathlib import Path

import psutil

# (limit, in use) of the control group that a container runs in: version 2, then version 1.
_GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
_LEFT_SHARE, _LEFT_BYTES = 1 / 3, 48 * 2**30  # what others of a host keep: loaders, the file system, checkpoints


def available_host_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be used without swapping, within the limit of the container if there is one.

    Args:
        groups: where the control group files are.
    """
    free = int(psutil.virtual_memory().available)
    for limit, used in _GROUPS:
        try:
            room = int((groups / limit).read_text()) - int((groups / used).read_text())
        except (OSError, ValueError):  # no such file, or no limit ("max")
            continue
        free = min(free, max(0, room))
    return free


def usable_host_memory(ranks: int) -> int:
    """Bytes of the free memory that each of `ranks` processes of a host may fill for good.

    A third of what is free is left to others, and of a large host 48 GiB.
    """
    free = available_host_memory()
    return int(free - min(free * _LEFT_SHARE, _LEFT_BYTES)) // ranks
