"""Constants that several packages share."""

from __future__ import annotations

IGNORE_INDEX = -100
"""The label of a token that does not count in the loss (`ignore_index` of `torch.nn.functional.cross_entropy`)."""
