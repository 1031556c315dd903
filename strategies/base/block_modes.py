"""How the blocks of a model keep their activations: one mode for all, or one for the first and another for the rest.

The blocks in front are treated most sparingly: those behind have given their memory back when the backward of the ones
in front computes them again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Literal, get_args

Mode = Literal["full", "selective", "offload"]
MODES: tuple[Mode, ...] = get_args(Mode)


def check_modes(text: str | None) -> None:
    """Raise ValueError if `text` is nothing that `modes_of_blocks` takes."""
    modes_of_blocks(text, 0)


def modes_of_blocks(text: str | None, count: int) -> list[Mode | None]:
    """The mode of each of `count` blocks.

    Args:
        text: "full": all blocks; "full:20": the first 20, the others keep everything; "full:20+selective": the others
            are selective.
        count: of blocks.

    Raises:
        ValueError: `text` is something else.
    """
    modes: list[Mode | None] = []
    for part in [] if text is None else str(text).split("+"):
        found = re.fullmatch(rf"({'|'.join(MODES)}|none)(?::(\d+))?", part)
        if found is None:
            raise ValueError(
                f"activation_checkpointing={text!r} is unknown. Allowed: {', '.join(MODES)}, or null for none; of the "
                "first 20 blocks alone full:20; with another for the rest full:20+selective."
            )
        mode = None if found[1] == "none" else found[1]
        modes += [mode] * (count if found[2] is None else int(found[2]))  # type: ignore[list-item]
    return (modes + [None] * count)[:count]


def uses(text: str | None, *modes: str) -> bool:
    """Whether `text`, of `modes_of_blocks`, names one of `modes`."""
    return any(part.partition(":")[0] in modes for part in str(text or "").split("+"))


def text_of(modes: Sequence[Mode | None]) -> str | None:
    """The text that gives these modes; None if no block is checkpointed."""
    runs = [(mode, len(list(blocks))) for mode, blocks in groupby(modes)]
    if len(runs) == 1:
        return runs[0][0]
    parts = [f"{mode or 'none'}:{count}" for mode, count in runs[:-1]]
    return "+".join(parts if runs[-1][0] is None else [*parts, str(runs[-1][0])])
