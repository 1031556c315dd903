"""Compares a layout's choices with those of one device: which ones flipped, and could rounding have flipped them?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from automodel_trainer.strategies import MeshStrategy
from automodel_trainer.verification.choices import Choice
from automodel_trainer.verification.outputs import whole_output


@dataclass
class Flip:
    """The choices of one call that the layout made differently.

    Args:
        step, micro_batch: counted from 0.
        order: the position of the call in the forward of one device.
        module: the module whose forward makes the call.
        count: how many choices flipped.
        gap: the largest gap of a flipped choice on one device, as a part of its row's largest score.
        error: the largest difference between the scores of this call, flipped or not, as a part of the row's largest.
    """

    step: int
    micro_batch: int
    order: int
    module: str
    count: int
    gap: float
    error: float


@dataclass
class Flips:
    """The flips that one rank found.

    Args:
        flips: the first call with flips in each of this rank's micro-batches.
        compared: how many choices were compared.
        missed: modules with choices that could not be compared.
    """

    flips: list[Flip] = field(default_factory=list)
    compared: int = 0
    missed: set[str] = field(default_factory=set)


def save_choices(calls: Sequence[Choice], step: int, micro_batch: int) -> dict[str, Tensor]:
    """The choices of one forward on one device, as tensors by the names under which the file keeps them."""
    kept: dict[str, Tensor] = {}
    for order, call in enumerate(calls):
        key = f"choice/{step}/{micro_batch}/{order:05d}/{call.module}"
        kept |= {f"{key}/scores": call.scores, f"{key}/chosen": call.chosen.float()}
    return kept


def load_choices(kept: Mapping[str, Tensor]) -> list[Choice]:
    """The choices that `save_choices` saved, in order. The names lack everything before the order of the call."""
    keys = sorted({name.rpartition("/")[0] for name in kept})
    return [Choice(k.partition("/")[2], kept[f"{k}/scores"], kept[f"{k}/chosen"].bool()) for k in keys]


class Comparer:
    """Matches a rank's choices with those of one device, module by module and call by call. Collective.

    Args:
        steps: the micro-batches of every step.
        strategy: the layout.

    Attributes:
        found: the flips so far.
    """

    def __init__(self, steps: Sequence[Sequence[Mapping[str, Any]]], strategy: MeshStrategy) -> None:
        self._steps, self._strategy = steps, strategy
        self.found = Flips()

    def compare(self, step: int, calls: Sequence[Choice], reference: Mapping[int, Sequence[Choice]]) -> None:
        """Compare this rank's choices in a step with those that one device made for the same micro-batches.

        Args:
            step: counted from 0.
            calls: of this rank, in the order in which they ran.
            reference: of one device, by the number of the micro-batch.
        """
        mine: dict[str, list[Choice]] = {}
        for call in calls:
            mine.setdefault(call.module, []).append(call)
        # Count calls per module: a pipeline interleaves the forwards of its stages, but each module sees the
        # micro-batches in order.
        begun: Counter[str] = Counter()
        for number in sorted(reference):
            flipped = False
            for order, wanted in enumerate(reference[number]):
                made = mine.get(wanted.module, [])
                place, begun[wanted.module] = begun[wanted.module], begun[wanted.module] + 1
                got = self._whole(made[place], wanted, step, number) if place < len(made) else None
                if got is None:  # another rank's stage has the module, or a compiled block hides it
                    self.found.missed.add(wanted.module)
                    continue
                self.found.compared += wanted.chosen[..., 0].numel()
                flip = _flip(got, wanted, step, number, order)
                if flip is not None and not flipped:  # later flips may be its consequence
                    flipped = True
                    self.found.flips.append(flip)

    def _whole(self, local: Choice, wanted: Choice, step: int, number: int) -> Choice | None:
        """This rank's part of a call, joined with the other ranks' parts. None if the parts cannot be joined."""
        shape, batches = wanted.scores.shape, self._steps[step]
        if local.scores.shape == shape:
            return Choice(local.module, local.scores.cpu(), local.chosen.cpu())
        rows, length = batches[number]["input_ids"].shape
        most = rows, length
        if self._strategy.dims.pp > 1:  # pipelines pad micro-batches to one shape
            most = tuple(max(m["input_ids"].shape[axis] for m in batches) for axis in (0, 1))
        n = shape[-1]
        known = local.scores.ndim <= 3 and shape.numel() == rows * length * n
        if not known or local.scores.shape[-1] != n or local.scores.numel() % (most[0] * n):
            return None
        both = torch.cat([local.scores, local.chosen.float()], -1).reshape(most[0], -1, 2 * n)
        whole = whole_output(both, torch.Size((*most, 2 * n)), self._strategy)
        if whole is None:
            return None
        whole = whole[:rows, :length].reshape(*shape[:-1], 2 * n).cpu()
        return Choice(local.module, whole[..., :n], whole[..., n:].bool())


def _flip(got: Choice, wanted: Choice, step: int, number: int, order: int) -> Flip | None:
    flipped = (got.taken() != wanted.taken()).any(-1)
    if not flipped.any():
        return None
    gap = float(wanted.gaps()[flipped].max())
    difference = (got.scores - wanted.scores).abs().nan_to_num(math.inf, math.inf)
    difference = difference.where(got.scores != wanted.scores, 0.0)  # −inf − −inf is NaN: masked in both, no error
    error = float((difference.amax(-1) / wanted.scale()).max())
    return Flip(step, number, order, wanted.module, int(flipped.sum()), gap, error)


def first_flips(ranks: Sequence[Flips]) -> list[Flip]:
    """The flips that are not consequences of others: in the earliest step, the first call of every micro-batch."""
    flips = [flip for rank in ranks for flip in rank.flips]
    step = min((flip.step for flip in flips), default=0)
    first: dict[int, Flip] = {}
    for flip in (f for f in flips if f.step == step):
        known = first.setdefault(flip.micro_batch, flip)
        if (flip.order, -flip.error, -flip.gap) < (known.order, -known.error, -known.gap):
            first[flip.micro_batch] = flip
    return [first[number] for number in sorted(first)]


def by_rounding(flips: Sequence[Flip], limit: float) -> bool:
    """Whether there are flips, and scores within `limit` of each other decided all of them (`rounding`)."""
    return bool(flips) and all(flip.gap <= limit and flip.error <= limit for flip in flips)


def describe(flips: Sequence[Flip], choices: int, limit: float) -> str:
    """The finding about these flips, in words.

    Args:
        flips: at least one.
        choices: how many choices one device made.
        limit: the largest error that rounding explains.
    """
    count, gap, error = sum(f.count for f in flips), max(f.gap for f in flips), max(f.error for f in flips)
    where = ", ".join(dict.fromkeys(f.module for f in flips))
    said = f"{count} of {choices} choices (top-k, as of experts) fell the other way, first in {where}, "
    said += f"step {flips[0].step + 1}: "
    if by_rounding(flips, limit):
        return f"{said}their scores differ by {gap:.0e}, which is less than rounding ({limit:.0e}). This says nothing "\
            "about the layout."  # fmt: skip
    return (
        f"{said}their scores differ by up to {gap:.0e} on one device, and the layout's scores are off by up to "
        f"{error:.0e}. Rounding explains {limit:.0e}: the scores are wrong."
    )
