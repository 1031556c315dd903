"""A memory budget as a setting, and what was chosen for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from automodel_trainer.nn.tiles import Count

GIB = 2**30
Memory = str | float | None


@dataclass(frozen=True)
class Chosen:
    """What a budget has chosen for a run, and what it was chosen by.

    Attributes:
        modes: how blocks keep their activations; see `modes_of_blocks`.
        tiles: the number of tiles of MLPs, or "auto"; None: they are not tiled.
        blocks: of the model.
        recomputed: of them are computed again in backward.
        in_part: of them are computed again but for matmuls and attention.
        peak: the most bytes of the device that a step took, with optimizer state that does not exist yet.
        budget: bytes that it may take.
        host: bytes of host memory.
        tokens: of the micro-batch that was tried.
        trials: steps that were tried.
    """

    modes: str | None
    tiles: Count | None
    blocks: int = 0
    recomputed: int = 0
    in_part: int = 0
    peak: int = 0
    budget: int = 0
    host: int = 0
    tokens: int = 0
    trials: int = 0

    def __str__(self) -> str:
        took = f"a step of {self.tokens:,} tokens takes {gib(self.peak)} of {gib(self.budget)}"
        counts = (("", self.recomputed), (" in part", self.in_part))
        again = " and ".join(f"{count}{how}" for how, count in counts if count) or "none"
        again = f"of {self.blocks} blocks {again} are computed twice"
        host = f", and {gib(self.host)} of host memory" if self.host else ""
        return f"{self.setting}: {took}; {again}{host} ({self.trials} steps tried)"

    @property
    def setting(self) -> str:
        """The same choice as a user would write it."""
        tiles = "" if self.tiles is None else f",tiled_mlp={self.tiles}"
        return f"activation_checkpointing={self.modes or 'null'}{tiles}"


def gib(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 100 else f"{size / 2**20:.2f} MiB"


@dataclass(frozen=True)
class Budget:
    """How much memory of a device a process may take.

    Attributes:
        given: as the user has it.
        share: of the device; None: `gib` says it.
        gib: GiB.
    """

    given: str | float
    share: float | None = None
    gib: float = 0.0

    @classmethod
    def of(cls, given: Any, activation_checkpointing: Any, tiled_mlp: Any) -> Budget | None:
        """The budget that is given; None if none is.

        Raises:
            ValueError: it is nothing of the kind, or what it is to choose is given too.
        """
        if given is None:
            return None
        for name, value in (("activation_checkpointing", activation_checkpointing), ("tiled_mlp", tiled_mlp)):
            if value not in (None, False):
                raise ValueError(
                    f"memory={given!r} chooses {name}, and {name}={value!r} is given too. Leave one of them out."
                )
        found = re.fullmatch(r"([0-9]*\.?[0-9]+) *(%|GiB)?", str(given).strip())
        number = 0.0 if found is None or isinstance(given, bool) else float(found[1])
        if found is None or number <= 0 or (found[2] == "%" and number > 100):
            raise ValueError(
                f"memory={given!r} is unknown. Allowed: a share of the device (80%), or GiB as text or a number "
                "(20GiB, 20)."
            )
        return cls(given, share=number / 100) if found[2] == "%" else cls(given, gib=number)

    def refuse(self, layout: str) -> None:
        """Raise ValueError for a layout whose steps cannot be tried."""
        raise ValueError(
            f"memory={self.given!r} does not work with {layout}: its steps cannot be tried and forgotten. Set "
            "activation_checkpointing and tiled_mlp, or use fsdp2, hsdp or ddp."
        )

    def bytes_of(self, total: int) -> int:
        """The budget in bytes.

        Args:
            total: bytes of the device.

        Raises:
            ValueError: the device has less.
        """
        asked = int(self.gib * GIB if self.share is None else self.share * total)
        if asked > total:
            raise ValueError(
                f"memory={self.given!r} is more than the {total / GIB:.1f} GiB of this device. Give a share, such as "
                "memory=90%."
            )
        return asked
