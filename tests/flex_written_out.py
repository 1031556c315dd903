"""FlexAttention in plain torch: it has a backward on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput


def written_out(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """What FlexAttention returns, and the log-sum-exp of the scores."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.mT * options["scale"]
    b, h, q, k = (torch.arange(n).view([n if i == d else 1 for i in range(4)]) for d, n in enumerate(scores.shape))
    if options["score_mod"] is not None:
        scores = options["score_mod"](scores, b, h, q, k)
    scores = scores.masked_fill(~options["block_mask"].mask_mod(b, h, q, k), -torch.inf)
    return scores.softmax(-1) @ value, AuxOutput(lse=scores.logsumexp(-1))
