"""What layers that carry state along a row need to keep its documents apart, where their kernels can be told."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

BY_LENGTH = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""The keyword arguments that transformers hands on to kernels of linear attention, convolutions and state spaces."""


def document_inputs(inputs: dict[str, Any], lengths: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The inputs of a model's forward with the lengths of the documents in them, all rows laid end to end.

    The kernels of linear attention take one row, so the rows `[b, s]` become one of `[1, b · s]`.

    Args:
        inputs: `input_ids` and `position_ids` `[b, s]`, or `[k, b, s]` of a model with several positions for a token;
            what is no tensor `[b, s]` stays as it is.
        lengths: of the documents of each row, on the host; padding at the end of a row is a document of its own.

    Returns:
        `inputs` as one row, `cu_seq_lens_q` and `_k` (int32 `[n + 1]`: where documents begin, and the end),
        `max_length_q` and `_k` (an upper bound, the same in every micro-batch), and `seq_idx` (int32 `[1, b · s]`).
    """
    ids: Tensor = inputs["input_ids"]
    flat = torch.tensor([n for row in lengths for n in row])
    assert int(flat.sum()) == ids.numel(), "the documents fill their rows"
    starts = torch.cat([flat.new_zeros(1), flat.cumsum(0)]).to(torch.int32)
    numbers = torch.repeat_interleave(torch.arange(len(flat), dtype=torch.int32), flat)[None]
    rows = {k: v.reshape(1, -1) if isinstance(v, Tensor) and v.shape == ids.shape else v for k, v in inputs.items()}
    if isinstance(several := inputs.get("position_ids"), Tensor) and several.ndim == 3:
        rows["position_ids"] = several.reshape(len(several), 1, -1)
    starts, numbers = (t.to(ids.device, non_blocking=True) for t in (starts, numbers))
    width = ids.shape[1]
    return rows | {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": width,
        "max_length_k": width,
        "seq_idx": numbers,
    }


def lengths_of(position_ids: Tensor) -> list[list[int]]:
    """The lengths of the documents of each row, of positions that restart at each. Waits for the device.

    Args:
        position_ids: `[b, s]`, or `[k, b, s]` of which the first count the tokens of a document.
    """
    rows = (position_ids if position_ids.ndim == 2 else position_ids[0]).cpu()
    starts = torch.diff(rows, prepend=rows[:, :1] - 1, dim=-1) != 1
    starts[:, 0] = True
    ends = [[*row.nonzero().flatten().tolist(), rows.shape[1]] for row in starts]
    return [[b - a for a, b in pairwise(row)] for row in ends]
