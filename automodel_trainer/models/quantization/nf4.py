"""Numbers in 4 bits (NF4, arXiv 2305.14314) as the parts that they are packed into, by torchao or by bitsandbytes.

Both give every 64 numbers a scale, and the scales of a large weight a second scale each 256.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

BLOCK = 64  # numbers that share a scale
SCALE_BLOCK = 256  # scales that share a second scale
PACKINGS = ("nf4", "bnb-nf4")


@dataclass(frozen=True)
class Parts:
    """`n` packed numbers.

    Args:
        codes: uint8 `[n / 2]`, two numbers a byte.
        scales: of every block, `[n / 64]`: 8 bits, or fp32 where they are not packed themselves.
        factors: of every `scale_block` scales; empty where scales are fp32.
        mean: of all scales, 0-dim. It stays the whole weight's in a shard.
        levels: the table that codes (torchao) or scales (bitsandbytes) index.
    """

    codes: Tensor
    scales: Tensor
    factors: Tensor
    mean: Tensor
    levels: Tensor
