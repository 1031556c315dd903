"""What each parameter group of a run goes on with, when the checkpoint's groups may hold other parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from automodel_trainer.checkpoint.given import Options, same


@dataclass(frozen=True)
class GroupOptions:
    """The options of a group of this run in the run that wrote the checkpoint.

    Attributes:
        saved: their values when it was written.
        then: what they were given; None if that is not known.
    """

    saved: Options
    then: Options | None


def options_of_groups(
    now: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], given: Sequence[Options] | None
) -> list[GroupOptions]:
    """The options that a checkpoint has for each group of this run, by the names of its parameters.

    A group that holds parameters of several saved groups has only the options on which all of these agree. On the
    others this run's values are the only ones that hold for all.

    Args:
        now: the groups of this run, each with the names of its "parameters".
        saved: those of the checkpoint, with their "options".
        given: what the saved groups were given; it may be shorter (groups that a callback added later were given
            nothing by the user). None: not known.
    """
    then = [given[i] if given and i < len(given) else None for i in range(len(saved))]
    before = [GroupOptions(dict(group["options"]), options) for group, options in zip(saved, then)]
    if [set(group["parameters"]) for group in now] == [set(group["parameters"]) for group in saved]:
        return before
    owner = {name: number for number, group in enumerate(saved) for name in group["parameters"]}
    members = [sorted({owner[name] for name in group["parameters"]}) for group in now]
    return [_agreed([before[number] for number in numbers]) for numbers in members]


def _agreed(groups: Sequence[GroupOptions]) -> GroupOptions:
    if not groups:  # a group without parameters
        return GroupOptions({}, None)
    first, *others = groups
    agreed = {key for key in first.saved if all(_same_option(first, other, key) for other in others)}
    then = None if first.then is None else {key: value for key, value in first.then.items() if key in agreed}
    return GroupOptions({key: value for key, value in first.saved.items() if key in agreed}, then)


def _same_option(one: GroupOptions, other: GroupOptions, key: str) -> bool:
    if key not in other.saved or not same(one.saved[key], other.saved[key]):
        return False
    return same((one.then or {}).get(key), (other.then or {}).get(key))
