"""Weights in a file as codes and scales, read as if they were dense: any part of them, without the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from automodel_trainer.models.files import TensorSlice
from automodel_trainer.models.quantization.mxfp4 import pairs, powers

_PART = 2**18  # values that are computed at a time


class DenseWeight:
    """A `TensorSlice` of values that the file does not hold as such.

    Args:
        name: for error messages.
        shape: of the dense weight.
    """

    def __init__(self, name: str, shape: Sequence[int]) -> None:
        self.name, self.shape = name, list(shape)

    def get_shape(self) -> list[int]:
        """The shape of the dense weight."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """The dtype of the values, in which they are exact, or fp32: whoever reads them rounds them once."""
        return "F32"

    def __getitem__(self, index: Any) -> Tensor:
        """Read a part of the weight: slices of step 1, one for each of the first dimensions."""
        parts = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
        parts = tuple(part for part in parts if part is not Ellipsis)
        assert all(isinstance(part, slice) and part.step in (None, 1) for part in parts), "only slices are read"
        parts += (slice(None),) * (len(self.shape) - len(parts))
        return self.read([range(*part.indices(size)) for part, size in zip(parts, self.shape)])

    def read(self, ranges: Sequence[range]) -> Tensor:
        """Values in these ranges of indices, one range for each dimension."""
        raise NotImplementedError


class Fp8Weight(DenseWeight):
    """fp8 codes (or, in bytes, two 4-bit codes each) times a scale for the whole weight, a row, or a block.

    Args:
        name: of the weight.
        codes: `[…, out, in]`; of 4-bit codes `[…, out, in / 2]`, the lower half of a byte first.
        scales: of one, `[…, out, 1]`, or `[…, ⌈out / b⌉, ⌈in / c⌉]`. Bytes are exponents of two.
        block: (b, c), if the config says it. A size that does not fit the scales is derived from their number.

    Raises:
        ValueError: the scales do not fit the weight.
    """

    def __init__(self, name: str, codes: TensorSlice, scales: TensorSlice, block: Sequence[int] | None) -> None:
        self.codes, self.scales = codes, scales
        self.packed = codes.get_dtype() == "I8"
        *before, last = codes.get_shape()
        super().__init__(name, [*before, last * (2 if self.packed else 1)])
        self.grid = self._grid(list(scales.get_shape()))
        wanted = [*[1] * (len(self.shape) - 2), *(block or [1, 1])][-len(self.shape) :]
        self.block = [self._block(n, count, size) for n, count, size in zip(self.shape, self.grid, wanted)]

    def _grid(self, shape: list[int]) -> list[int]:
        """The shape of the scales, with as many dimensions as the weight has."""
        ndim = len(self.shape)
        if math.prod(shape) == 1:
            return [1] * ndim
        if len(shape) == ndim:
            return shape
        for grid in ([*shape, *[1] * (ndim - len(shape))], [*[1] * (ndim - len(shape) - 1), *shape, 1]):
            if len(grid) == ndim and all(count in (1, size) for count, size in zip(grid, self.shape)):
                return grid
        raise ValueError(self._misfit())

    def _block(self, size: int, count: int, wanted: int) -> int:
        if count == 1:
            return max(size, 1)
        if count == size:
            return 1
        if wanted > 1 and -(-size // wanted) == count:  # the last block may be a part of one
            return wanted
        if size % count:
            raise ValueError(self._misfit())
        return size // count

    def _misfit(self) -> str:
        return (
            f"The scales of {self.name} have the shape {list(self.scales.get_shape())}, which does not fit a weight of "
            f"shape {self.shape}. The checkpoint is damaged, or its quantization_config is not that of its weights."
        )

    def read(self, ranges: Sequence[range]) -> Tensor:
        """See `DenseWeight.read`."""
        codes, scales = self._codes(ranges), _powers(self.scales[...]).reshape(self.grid)
        places = [torch.arange(r.start, r.stop) // block for r, block in zip(ranges, self.block)]
        for dim in range(1, len(ranges)):
            if scales.shape[dim] > 1:
                scales = scales.index_select(dim, places[dim])
        values = torch.empty([len(r) for r in ranges])
        for part in _parts(values):
            factor = scales if scales.shape[0] == 1 else scales.index_select(0, places[0][part])
            values[part].copy_(codes[part]).mul_(factor)
        return values

    def _codes(self, ranges: Sequence[range]) -> Tensor:
        """Values without their scales."""
        *rows, columns = ranges
        before = tuple(slice(r.start, r.stop) for r in rows)
        if not self.packed:
            return self.codes[(*before, slice(columns.start, columns.stop))]
        first, end = columns.start // 2, -(-columns.stop // 2)
        found = _unpacked(self.codes[(*before, slice(first, end))].view(torch.uint8))
        return found[..., columns.start - 2 * first :][..., : len(columns)]


class Mxfp4Weight(DenseWeight):
    """Blocks of 32 4-bit codes, two in a byte, with an exponent for each block; the model's weight is the transpose.

    Args:
        name: of the blocks.
        blocks: bytes `[…, out, in / 32, 16]`, the lower half of a byte first.
        scales: bytes `[…, out, in / 32]`: exponents of two.

    Source: OCP Microscaling Formats 1.0; the layout of the weights that transformers' `Mxfp4Config` reads.

    Raises:
        ValueError: blocks and scales do not fit each other.
    """

    def __init__(self, name: str, blocks: TensorSlice, scales: TensorSlice) -> None:
        *before, out, count, size = blocks.get_shape()
        if list(scales.get_shape()) != [*before, out, count]:
            raise ValueError(
                f"{name} has the shape {list(blocks.get_shape())}, and its scales have {list(scales.get_shape())}. "
                "There must be one for each block: the checkpoint is damaged."
            )
        super().__init__(name, [*before, 2 * size * count, out])
        self.blocks, self.scales, self.size = blocks, scales, 2 * size

    def read(self, ranges: Sequence[range]) -> Tensor:
        """See `DenseWeight.read`."""
        *before, inputs, outputs = ranges
        first, end = inputs.start // self.size, -(-inputs.stop // self.size)
        where = (*(slice(r.start, r.stop) for r in (*before, outputs)), slice(first, end))
        codes, scales = self.blocks[where].flatten(0, -4), powers(self.scales[where]).bfloat16().flatten(0, -3)
        values = torch.empty(len(codes), len(inputs), len(outputs), dtype=torch.bfloat16)
        kept = slice(inputs.start - first * self.size, inputs.stop - first * self.size)
        for value, code, scale in zip(values, codes, scales):
            value.copy_(_unpacked(code).mul_(scale.unsqueeze(-1)).flatten(-2)[:, kept].mT)
        return values.view([len(r) for r in ranges])

    def get_dtype(self) -> str:
        """Every value is exact in bf16."""
        return "BF16"

    def stored(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Codes `[n, …, out, in / 2]` and exponents `[n, …, out, in / 32]` of n indices from `first` on, as bytes."""
        return self.blocks[first:end].flatten(-2), self.scales[first:end]


def _unpacked(codes: Tensor) -> Tensor:
    """Bytes `[…, n]` as the values of two 4-bit codes each, `[…, 2 n]`, bf16: exact."""
    table = pairs().bfloat16().view(torch.int32).flatten()  # both values of a byte in one number
    found = table.index_select(0, codes.flatten().int()).view(torch.bfloat16)
    return found.view(*codes.shape[:-1], 2 * codes.shape[-1])


def _parts(values: Tensor) -> list[slice]:
    """Slices of the first dimension, so small that what is computed of one stays in a processor's cache."""
    rows = max(1, _PART * len(values) // max(1, values.numel()))
    return [slice(start, start + rows) for start in range(0, len(values), rows)]


def _powers(scales: Tensor) -> Tensor:
    """Scales in fp32. Bytes are exponents of two."""
    return powers(scales) if scales.dtype == torch.uint8 else scales.float()
