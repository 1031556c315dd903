"""Find the fastest way to keep activations that fits a budget, with few trials.

Plans lie on a ladder: keep everything; selective; full; offload. Between two rungs the first blocks are on the slower
one. A trial gives the peak of a plan, and the bytes that its blocks keep. What another plan takes is then that peak and
the difference of what blocks keep: an upper bound on the way up, since blocks behind give back what they keep before
those in front are computed again. So a trial that is expected to fit does, and ranks do not run out one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from automodel_trainer.strategies.base.block_modes import Mode

Key = tuple[Hashable, Mode | None]  # the kind of a block, and its mode
MOST = 6  # trials without tiles, and as many with them


class Plan(NamedTuple):
    """How each block keeps its activations, and whether MLPs are tiled."""

    modes: tuple[Mode | None, ...]
    tiled: bool = False


@dataclass(frozen=True)
class Trial:
    """What a step with a plan took.

    Attributes:
        plan: the plan.
        peak: bytes of the device; None: it ran out of memory.
        kept: bytes that a block keeps, by its kind and mode, of the blocks whose forward ended.
    """

    plan: Plan
    peak: int | None
    kept: dict[Key, int] = field(default_factory=dict)


Measure = Callable[[Plan], Trial]


def search(
    kinds: Sequence[Hashable], ladder: Sequence[Mode | None], tiles: bool, budget: int, measure: Measure
) -> tuple[Trial | None, list[Trial]]:
    """Try plans.

    Args:
        kinds: of the blocks: those of one kind keep the same.
        ladder: modes, the fastest first; one is "full".
        tiles: whether MLPs can be tiled.
        budget: bytes of the device.
        measure: tries a plan.

    Returns:
        the fastest plan that is known to fit, or None; and all trials.
    """
    kept: dict[Key, int] = {}
    trials: list[Trial] = []
    for tiled in (False, True) if tiles else (False,):
        # With tiles the rungs above "full" are left out: they did not fit, and tiles are no help there.
        rungs = [mode for mode in ladder if not tiled or mode in ("full", "offload")]
        climb = _Climb(kinds, rungs, tiled, budget, kept)
        found = climb.run(measure)
        trials += climb.trials
        if found is not None:
            return found, trials
    return None, trials


class _Climb:
    """The search on one ladder. Step `t` is the plan whose first `t % n` blocks are on the rung after `t // n`."""

    def __init__(
        self,
        kinds: Sequence[Hashable],
        ladder: Sequence[Mode | None],
        tiled: bool,
        budget: int,
        kept: dict[Key, int],
    ) -> None:
        self.kinds, self.ladder, self.tiled, self.budget, self.kept = kinds, ladder, tiled, budget, kept
        self.trials: list[Trial] = []
        self.last = (len(ladder) - 1) * len(kinds)
        self.low, self.high = -1, self.last + 1  # no step up to `low` fits; `high` is the fastest that does
        self.fits: Trial | None = None
        self.anchor: Trial | None = None  # the newest trial with a peak

    def run(self, measure: Measure) -> Trial | None:
        """The fastest plan that is known to fit."""
        plan, step = self._first()
        while len(self.trials) < MOST:
            self._note(measure(plan), step)
            following = self._next()
            if following is None:
                break
            plan, step = self.at(following), following
        if self.fits is None or self.fits.plan == self.at(self.high):
            return self.fits
        return Trial(self.at(self.high), math.ceil(self.estimate(self.high, self.fits)))

    def at(self, step: int) -> Plan:
        """The plan of a step."""
        rung, first = divmod(step, len(self.kinds))
        slower, faster = self.ladder[min(rung + 1, len(self.ladder) - 1)], self.ladder[rung]
        return Plan((slower,) * first + (faster,) * (len(self.kinds) - first), self.tiled)

    def estimate(self, step: int, trial: Trial) -> float:
        """Bytes that a step takes, after a trial; infinite if nobody knows."""
        assert trial.peak is not None
        return trial.peak + self._kept_by(self.at(step)) - self._kept_by(trial.plan)

    def _kept_by(self, plan: Plan) -> float:
        return sum(self.kept.get(key, math.inf) for key in zip(self.kinds, plan.modes))

    def _first(self) -> tuple[Plan, int]:
        """All blocks "full", but one of each kind for each faster mode: then it is known what these keep.

        With tiles, the last step: the others did not fit without them.
        """
        if self.tiled:
            return self.at(self.last), self.last
        rung = self.ladder.index("full")
        modes: list[Mode | None] = ["full"] * len(self.kinds)
        for kind in dict.fromkeys(self.kinds):
            blocks = [index for index, other in enumerate(self.kinds) if other == kind]
            if len(blocks) > rung:
                for index, mode in zip(blocks[1:], self.ladder[:rung]):
                    modes[index] = mode
        return Plan(tuple(modes), False), rung * len(self.kinds)

    def _note(self, trial: Trial, step: int) -> None:
        self.trials.append(trial)
        self.kept.update(trial.kept)
        if trial.peak is not None:
            self.anchor = trial
        if trial.peak is not None and trial.peak <= self.budget:
            self.high, self.fits = step, trial
        elif trial.plan == self.at(step):
            self.low = step

    def _next(self) -> int | None:
        """The step to try; None: there is nothing to gain, or nothing left."""
        failed = self.trials[-1].peak is None
        if not failed and self.anchor is not None:
            open_steps = range(self.low + 1, self.high)
            found = next((t for t in open_steps if self.estimate(t, self.anchor) <= self.budget), None)
            if found is not None:
                return found
        if self.fits is None:
            return self.last if self.low < self.last else None
        if failed and self.high - self.low > 1:
            return (self.low + self.high) // 2
        unknown = any((kind, self.ladder[0]) not in self.kept for kind in self.kinds)
        return 0 if unknown and self.low < 0 < self.high else None
