"""Pipeline schedules by name: what they need, the order of their work, and how long ranks are idle."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

from torch.distributed.pipelining.schedules import get_schedule_class

Kind = Literal["F", "B", "I", "W"]


@dataclass(frozen=True)
class ScheduleKind:
    """A schedule of `torch.distributed.pipelining`.

    Args:
        torch_name: its name for `get_schedule_class`.
        looped: whether every rank has several stages.
        v_shaped: whether a rank's two stages are the i-th from the front and the i-th from the back.
        splits_backward: whether gradients of inputs and of weights are computed at different times.
        source: the paper that describes it.
    """

    torch_name: str
    looped: bool = False
    v_shaped: bool = False
    splits_backward: bool = False
    source: str = ""


SCHEDULES: dict[str, ScheduleKind] = {
    "1f1b": ScheduleKind("1F1B", source="PipeDream, arXiv 1806.03377"),
    "gpipe": ScheduleKind("GPipe", source="arXiv 1811.06965"),
    "interleaved_1f1b": ScheduleKind("Interleaved1F1B", looped=True, source="Megatron-LM, arXiv 2104.04473"),
    "looped_bfs": ScheduleKind("LoopedBFS", looped=True, source="arXiv 2211.05953"),
    "interleaved_zero_bubble": ScheduleKind(
        "InterleavedZeroBubble", looped=True, splits_backward=True, source="arXiv 2401.10241"
    ),
    "zbv": ScheduleKind("ZBVZeroBubble", looped=True, v_shaped=True, splits_backward=True, source="arXiv 2401.10241"),
    "dualpipev": ScheduleKind(
        "DualPipeV", looped=True, v_shaped=True, splits_backward=True, source="DeepSeek-V3, arXiv 2412.19437"
    ),
}


def schedule_kind(name: str) -> ScheduleKind:
    """The schedule of that name, in upper or lower case.

    Raises:
        ValueError: the name is unknown.
    """
    kind = SCHEDULES.get(str(name).lower())
    if kind is None:
        near = difflib.get_close_matches(str(name).lower(), SCHEDULES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"schedule={name!r} is unknown.{hint} Allowed: {', '.join(SCHEDULES)}.")
    return kind


def stages_per_rank(name: str, virtual_stages: int | None) -> int:
    """The number of stages per rank.

    Args:
        name: the schedule's name.
        virtual_stages: the requested number; None: the schedule's default.

    Raises:
        ValueError: the schedule is unknown, or cannot work with this number.
    """
    kind = schedule_kind(name)
    if virtual_stages is None:
        return 2 if kind.looped else 1
    if not kind.looped and virtual_stages != 1:
        looped = ", ".join(n for n, k in SCHEDULES.items() if k.looped)
        raise ValueError(
            f"schedule={name!r} has one stage per rank, not virtual_stages={virtual_stages}. Schedules with several: "
            f"{looped}."
        )
    if kind.v_shaped and virtual_stages != 2:
        raise ValueError(
            f"schedule={name!r} has two stages per rank, not virtual_stages={virtual_stages}. Set virtual_stages=2, or "
            "leave it out."
        )
    if virtual_stages < 1:
        raise ValueError(f"virtual_stages={virtual_stages} must be a positive number of stages per rank.")
    return virtual_stages


def stages_of(name: str, rank: int, ranks: int, per_rank: int) -> list[int]:
    """The indices of a rank's stages.

    With 4 ranks and 2 stages per rank, rank 1 has [1, 5]; in a V-shaped schedule it has [1, 6].
    """
    if schedule_kind(name).v_shaped:
        return [rank, 2 * ranks - 1 - rank]
    return [rank + ranks * i for i in range(per_rank)]


def min_micro_batches(name: str, ranks: int, per_rank: int) -> int:
    """The smallest number of micro-batches that a schedule runs. With fewer, some ranks would have no work."""
    return ranks * per_rank if schedule_kind(name).torch_name == "DualPipeV" else ranks


def check_micro_batches(name: str, ranks: int, per_rank: int, micro_batches: int) -> None:
    """Check that a schedule can run this number of micro-batches.

    Raises:
        ValueError: there are too few, or the schedule cannot divide them into rounds. The message says what works.
    """
    least = min_micro_batches(name, ranks, per_rank)
    rounds = max(1, micro_batches // ranks)  # as torch's interleaved schedules compute them
    interleaved = schedule_kind(name).torch_name in ("Interleaved1F1B", "InterleavedZeroBubble")
    if micro_batches >= least and not (interleaved and micro_batches % rounds):
        return
    need = f"a multiple of {ranks}" if interleaved else f"at least {least}"
    raise ValueError(
        f"schedule={name!r} on {ranks} ranks needs {need} micro-batches per optimizer step, and this batch splits into "
        f"{micro_batches}. Raise accumulate_grad_batches, or the data's global_batch_size (global_batch_size = "
        "micro_batch_size × micro-batches × data-parallel ranks), or lower micro_batch_size or pp."
    )


def build_schedule(name: str, stages: Sequence[Any], micro_batches: int, loss_fn: Any) -> Any:
    """torch's schedule over this rank's stages. Losses are sums, so gradients are not scaled.

    Args:
        name: the schedule's name.
        stages: torch's stages of this rank.
        micro_batches: per optimizer step.
        loss_fn: makes a loss of the last stage's output and target.
    """
    cls: Any = get_schedule_class(schedule_kind(name).torch_name)
    own = stages if schedule_kind(name).looped else stages[0]
    return cls(own, micro_batches, loss_fn=loss_fn, scale_grads=False)


# --- the order of work, and how long it takes -------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One piece of a rank's work on a micro-batch.

    Args:
        kind: F: forward; B: backward; I and W: the halves of a split backward, for gradients of inputs and of weights.
        stage: index of the stage.
        micro_batch: index of the micro-batch.
    """

    kind: Kind
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class Timed:
    """A piece of work with its rank, start and end. The unit of time is the forward of a stage of cost 1."""

    work: Work
    rank: int
    start: float
    end: float


def order_of_work(name: str, ranks: int, per_rank: int, micro_batches: int) -> list[list[Work]]:
    """The work of every rank, in the order of torch's schedule.

    Raises:
        ValueError: the schedule is unknown, or cannot run this number of micro-batches.
    """
    check_micro_batches(name, ranks, per_rank, micro_batches)
    if not schedule_kind(name).looped:
        return [_single_stage_order(name, rank, ranks, micro_batches) for rank in range(ranks)]
    # torch writes down the order of all ranks when a looped schedule is made. These stand-ins for stages have the
    # attributes that it reads then.
    stages = [
        SimpleNamespace(
            num_stages=ranks * per_rank,
            group_size=ranks,
            group_rank=0,
            stage_index=index,
            is_first=index == 0,
            is_last=index == ranks * per_rank - 1,
            submod=None,
        )
        for index in stages_of(name, 0, ranks, per_rank)
    ]
    schedule = build_schedule(name, stages, micro_batches, None)
    order = schedule.pipeline_order or {}
    return [list(_flat(order[rank])) for rank in range(ranks)]


def unsplit(order: Sequence[Sequence[Work]]) -> list[list[Work]]:
    """The same order with whole backwards: each takes the place of a split one's first half; second halves go."""
    return [[replace(w, kind="B") if w.kind == "I" else w for w in works if w.kind != "W"] for works in order]


def _single_stage_order(name: str, rank: int, ranks: int, micro_batches: int) -> list[Work]:
    """The order of torch's schedules with one stage per rank (gpipe, 1f1b), which do not write it down."""
    ahead = micro_batches if name == "gpipe" else min(micro_batches, ranks - rank)  # forwards before a backward
    works = [Work("F", rank, i) for i in range(ahead)]
    for index in range(micro_batches):
        works.append(Work("B", rank, index))
        if ahead + index < micro_batches:
            works.append(Work("F", rank, ahead + index))
    return works


_KINDS: dict[str, Kind] = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def _flat(actions: Sequence[Any]) -> Any:
    """torch's actions as `Work`. DualPipeV's overlapped actions hold several; None is an idle slot."""
    for action in actions:
        if action is None:
            continue
        if getattr(action, "sub_actions", None):
            yield from _flat(action.sub_actions)
        elif action.computation_type.name in _KINDS:
            yield Work(_KINDS[action.computation_type.name], action.stage_index, action.microbatch_index)


def timeline(order: Sequence[Sequence[Work]], costs: Sequence[float] | None = None) -> list[Timed]:
    """When each piece of work runs, if ranks wait only for their dependencies and sending takes no time.

    Args:
        order: the work of every rank, in order.
        costs: the time of one forward of every stage; None: 1 each. A backward takes twice as long; each half of a
            split one takes as long as a forward.
    """
    last = max(work.stage for works in order for work in works)
    costs = costs or [1.0] * (last + 1)
    done: dict[tuple[str, int, int], float] = {}
    free, position = [0.0] * len(order), [0] * len(order)  # of every rank: when it is free, and its next work
    timed: list[Timed] = []
    moved = True
    while moved:
        moved = False
        for rank, works in enumerate(order):
            while position[rank] < len(works):
                work = works[position[rank]]
                ready = _ready(work, done, last)
                if ready is None:
                    break
                start = max(ready, free[rank])
                end = start + _duration(work) * costs[work.stage]
                done[work.kind, work.stage, work.micro_batch] = free[rank] = end
                timed.append(Timed(work, rank, start, end))
                position[rank] += 1
                moved = True
    assert all(p == len(works) for p, works in zip(position, order)), "the schedule deadlocks"
    return timed


def _duration(work: Work) -> float:
    """The duration of a piece of work, relative to the stage's forward."""
    if work.stage == 0 and work.kind in ("I", "W"):  # no gradient of token ids is needed, so W does everything
        return 0.0 if work.kind == "I" else 2.0
    return 2.0 if work.kind == "B" else 1.0


def _ready(work: Work, done: dict[tuple[str, int, int], float], last: int) -> float | None:
    """When the dependencies of a piece of work are done; None if that is not known yet."""
    stage, micro_batch = work.stage, work.micro_batch
    if work.kind == "F":
        return 0.0 if stage == 0 else done.get(("F", stage - 1, micro_batch))
    if work.kind == "W":
        return done.get(("I", stage, micro_batch))
    forward = done.get(("F", stage, micro_batch))
    if stage == last or forward is None:
        return forward
    after = [done.get((kind, stage + 1, micro_batch)) for kind in ("B", "I")]  # either makes the gradient of the input
    return next((max(forward, end) for end in after if end is not None), None)


def bubble_share(timed: Sequence[Timed]) -> float:
    """The share of the ranks' total time in which they wait."""
    ranks = 1 + max(item.rank for item in timed)
    busy = sum(item.end - item.start for item in timed)
    return 1 - busy / (ranks * max(item.end for item in timed))
