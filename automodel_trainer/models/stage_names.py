"""Names and tensors of all pipeline stages. Each rank of a pipeline holds only some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from automodel_trainer.models.record import record_of, recorded

T = TypeVar("T")


class Stages(Protocol):
    """The part of a pipeline that this file uses.

    Attributes:
        rank: position of this rank in the pipeline, from 0.
        ranks: number of ranks in the pipeline.
        group: the process group of these ranks.
        device: the device that they send tensors from.
        model: its `split` says which modules and names this rank holds.
    """

    rank: int
    ranks: int
    group: ProcessGroup
    device: torch.device

    @property
    def model(self) -> Any:
        """The model that is split."""
        ...


@dataclass(frozen=True)
class SplitOver:
    """On a model: this rank holds some stages of it.

    Args:
        pipeline: the ranks that hold all stages.
    """

    pipeline: Stages


def mark(model: nn.Module, pipeline: Stages) -> None:
    """Record on `model` that this rank holds some stages of it."""
    record_of(model).keep(SplitOver(pipeline))


def pipeline_of(model: nn.Module) -> Stages | None:
    """The pipeline that `model` is split over; None for a whole model."""
    split = recorded(model, SplitOver)
    return split.pipeline if split is not None else None


def from_all_stages(model: nn.Module, value: T) -> list[T]:
    """The `value` of every rank of the pipeline, in order; only this rank's for a whole model. Collective."""
    pipeline = pipeline_of(model)
    if pipeline is None:
        return [value]
    values: list[Any] = [None] * pipeline.ranks
    dist.all_gather_object(values, value, group=pipeline.group)
    return values


def of_all_stages(model: nn.Module, values: Mapping[str, T]) -> dict[str, T]:
    """Merge values by tensor name over all stages, in the order of the whole model. Collective.

    If several stages have a name, the value of the first one is taken.
    """
    merged: dict[str, T] = {}
    for part in from_all_stages(model, dict(values)):
        merged = {**part, **merged}
    pipeline = pipeline_of(model)
    if pipeline is None:
        return dict(values)
    place = {name: i for i, name in enumerate(pipeline.model.split.names)}
    return dict(sorted(merged.items(), key=lambda item: place.get(item[0], len(place))))


def names_of_all_stages(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Merge `names` over all stages, in the order of the whole model. Collective."""
    return list(of_all_stages(model, dict.fromkeys(names)))


class WholeTensors:
    """Gathers the tensors of all stages, one at a time, on the ranks of the first stage. Creating it is collective.

    Args:
        model: a whole model, or this rank's stages of one.
        tensors: this rank's tensors by name.
        whole: gathers a tensor over the ranks of its stage.

    Attributes:
        shapes: shape and dtype of every tensor of every stage, in the order of the whole model.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor]) -> None:
        self._pipeline, self._tensors, self._whole = pipeline_of(model), tensors, whole
        rank = self._pipeline.rank if self._pipeline is not None else 0
        facts = of_all_stages(model, {name: (rank, t.shape, t.dtype) for name, t in tensors.items()})
        self._owners = {name: owner for name, (owner, _, _) in facts.items()}
        self.shapes = {name: (shape, dtype) for name, (_, shape, dtype) in facts.items()}

    def get(self, name: str) -> Tensor | None:
        """The whole tensor, in its full shape, on ranks of the first stage (of a whole model: on all); None elsewhere.

        Collective: all ranks must ask for the same names in the same order.
        """
        owner, pipeline = self._owners[name], self._pipeline
        rank = pipeline.rank if pipeline is not None else 0
        full = self._whole(self._tensors[name]) if rank == owner else None
        if pipeline is None or owner == 0 or rank not in (0, owner):
            return full
        if full is not None:
            dist.send(full.to(pipeline.device).contiguous(), group=pipeline.group, group_dst=0)
            return None
        shape, dtype = self.shapes[name]
        full = torch.empty(shape, dtype=dtype, device=pipeline.device)
        dist.recv(full, group=pipeline.group, group_src=owner)
        return full


def held_elsewhere(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of the `names` that belong to stages of other ranks."""
    pipeline = pipeline_of(model)
    absent = pipeline.model.split.absent if pipeline is not None else []
    inside = tuple(f"{name}." for name in absent)
    return {name for name in names if name in absent or name.startswith(inside)}


def own_runs_of_layers(model: nn.Module, stack: str) -> list[range] | None:
    """The layers of each of this rank's stages, as indices into the list of layers called `stack`.

    None for a whole model, or for a list that is not split over stages.
    """
    pipeline = pipeline_of(model)
    if pipeline is None or pipeline.model.split.parts.layers != stack:
        return None
    return [stage.layers for stage in pipeline.model.split.own]


def modules_around_layers(model: nn.Module) -> set[str]:
    """Names of the modules that contain the layers of a pipelined model; empty for a whole model.

    Their outputs are those of one stage, not of the whole model.
    """
    pipeline = pipeline_of(model)
    if pipeline is None:
        return set()
    path = pipeline.model.split.parts.layers.split(".")
    return {".".join(path[:end]) for end in range(len(path))}
