"""Context parallel: split the sequence of every micro-batch over ranks, with balanced causal work.

Rank r takes two of the 2·cp equal chunks of the sequence, r and 2·cp−1−r. The early chunk has little to attend to and
the late one has much, so every rank does the same work. Positions and (already shifted) targets are split the same way.
In a transformer only attention mixes tokens. It communicates through a Hugging Face attention function that
`install_attention` puts into the model's config (`attention.py`), so no model code changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers.masking_utils import find_packed_sequence_indices

from automodel_trainer.nn.constants import IGNORE_INDEX
from automodel_trainer.strategies.context._pytree import map_tensors
from automodel_trainer.strategies.context.attention import Sequences, exchanging


class ContextParallel:
    """One cp group: splits micro-batches, and tells attention about the whole sequence.

    Args:
        mesh: the 1-D mesh that sequences are split over.
        method: "ulysses" turns sequence shards into head shards (any mask and kernel; cp must divide the heads), "ring"
            passes keys and values around.
        multiple_of: each chunk's length is a multiple of this. Sequence parallel needs it, which splits shards further.
        at_decoder: the model gets whole rows, which are split where its decoder begins (`at_decoder.py`).
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        method: Literal["ulysses", "ring"] = "ulysses",
        multiple_of: int = 1,
        at_decoder: bool = False,
    ) -> None:
        self.group = mesh.get_group()
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.method = method
        self.multiple_of = 2 * self.size * multiple_of
        self.at_decoder = at_decoder

    # --- splitting --------------------------------------------------------------------------------------------------

    @contextmanager
    def split(self, inputs: dict[str, Any], targets: Any) -> Iterator[tuple[dict[str, Any], Any]]:
        """A context around forward and backward that yields this rank's part of a micro-batch.

        It must cover backward too, which may recompute attention.

        Args:
            inputs: inputs of the model's forward: `input_ids` `[b, s]`, optionally `position_ids` (`[b, s]`, or
                `[4, b, s]` with those of the document first) and `attention_mask`. With `at_decoder` also others.
            targets: tensors `[b, s]` aligned with the logits, in any nesting. They must be shifted already, so that no
                label at a shard's edge is lost. Tensors of other shapes are unchanged.

        Raises:
            ValueError: there is no rule to split one of the inputs.
        """
        rows, length = inputs["input_ids"].shape
        sequences = self._sequences(inputs, rows, length)
        if self.at_decoder:
            parts = self._whole(inputs, rows, length)
        else:
            _refuse_unknown(inputs, rows, length)
            parts = self._shards(inputs, sequences)
        targets = map_tensors(lambda t: self.shard(self._pad(t, IGNORE_INDEX)), targets, (rows, length))
        with exchanging(sequences):
            yield parts, targets

    def _sequences(self, inputs: dict[str, Any], rows: int, length: int) -> Sequences:
        """What attention needs to know about the whole, padded sequence."""
        device = inputs["input_ids"].device
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        packed = positions is not None and mask is None  # transformers' own rule
        if positions is None:
            positions = torch.arange(length, device=device)[None]
        elif positions.ndim == 3:
            positions = positions[0]
        positions = pad_positions(positions.expand(rows, -1), self.padded(length), restart=packed)
        whole = None if mask is None else self._pad(mask, 0).bool()
        documents = find_packed_sequence_indices(positions) if packed else None
        order = torch.cat([self._indices(rank, self.padded(length), device) for rank in range(self.size)])
        cut = self._cut if self.at_decoder else None
        return Sequences(self.group, self.method, order, positions, documents, whole, cut)

    def _shards(self, inputs: dict[str, Any], sequences: Sequences) -> dict[str, Any]:
        """This rank's part of the model's inputs."""
        positions, whole = sequences.position_ids, sequences.attention_mask
        # A mask of ones stops transformers from looking for documents in a shard's positions, which jump between its
        # two chunks.
        mask = torch.ones_like(positions) if whole is None else whole.to(positions.dtype)
        padded = {"input_ids": self._pad(inputs["input_ids"], 0), "position_ids": positions, "attention_mask": mask}
        return {key: self.shard(v) if isinstance(v, Tensor) else v for key, v in {**inputs, **padded}.items()}

    def _whole(self, inputs: dict[str, Any], rows: int, length: int) -> dict[str, Any]:
        """The model's inputs, those that have a number for each token padded."""
        padded = dict(inputs)
        for name, value in inputs.items():
            if not isinstance(value, Tensor) or value.is_floating_point():
                continue
            if name == "position_ids":
                restart = inputs.get("attention_mask") is None
                flat = pad_positions(value.reshape(-1, length), self.padded(length), restart)
                padded[name] = flat.reshape(*value.shape[:-1], -1)
            elif value.shape == (rows, length):
                padded[name] = self._pad(value, 0)
        return padded

    def padded(self, length: int) -> int:
        """The length that a sequence of `length` tokens is padded to."""
        return -(-length // self.multiple_of) * self.multiple_of

    def _pad(self, tensor: Tensor, value: int) -> Tensor:
        """`[b, s]` to `[b, padded(s)]`."""
        return F.pad(tensor, (0, self.padded(tensor.shape[1]) - tensor.shape[1]), value=value)

    def shard(self, tensor: Tensor) -> Tensor:
        """This rank's two chunks of `tensor` `[b, s, …]`: `[b, s / cp, …]`. `s` must be padded."""
        chunks = tensor.chunk(2 * self.size, dim=1)
        return torch.cat([chunks[self.rank], chunks[2 * self.size - 1 - self.rank]], dim=1)

    def _cut(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's two chunks of `tensor` along `dim`, whose size is padded."""
        return self.shard(tensor.movedim(dim, 1)).movedim(1, dim)

    def gather(self, tensor: Tensor, length: int) -> Tensor:
        """Gather the ranks' shards `[b, s / cp, …]` into `[b, length, …]` in natural order. Collective, no gradient."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        # first chunks are 0, 1, …, cp−1; second chunks are 2·cp−1, …, cp, so they are joined in reverse
        first, second = zip(*(part.chunk(2, dim=1) for part in parts))
        return torch.cat([*first, *second[::-1]], dim=1)[:, :length]

    def _indices(self, rank: int, length: int, device: torch.device) -> Tensor:
        """The global indices of a rank's tokens, int64 `[length / cp]`."""
        chunks = torch.arange(length, device=device).chunk(2 * self.size)
        return torch.cat([chunks[rank], chunks[2 * self.size - 1 - rank]])


def pad_positions(positions: Tensor, length: int, restart: bool) -> Tensor:
    """Extend positions `[b, s]` to `[b, length]`.

    Args:
        restart: whether the padding is a document of its own, as in packed rows; otherwise positions continue.
    """
    missing = length - positions.shape[1]
    if not missing:
        return positions
    more = torch.arange(missing, device=positions.device).expand(len(positions), -1)
    return torch.cat([positions, more if restart else positions[:, -1:] + 1 + more], dim=1)


def _refuse_unknown(inputs: dict[str, Any], rows: int, length: int) -> None:
    """Raise for an input tensor that there is no rule to split by."""
    known = ("input_ids", "position_ids", "attention_mask")
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            continue
        if name not in known or value.ndim != 2 or value.shape[-1] != length:
            raise ValueError(
                f"Context parallel (cp > 1) cannot split the input {name!r} of shape {list(value.shape)} in a "
                f"micro-batch of {rows} × {length} tokens. It can split {', '.join(known)}, each [rows, tokens]. Leave "
                "this input out, or set cp=1."
            )
