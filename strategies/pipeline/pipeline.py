"""One optimizer step through a pipeline, and one forward without gradients, on `torch.distributed.pipelining`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from automodel_trainer.distributed.phase import enter_phase
from automodel_trainer.strategies.pipeline._pipelining import PipelineStage, unviewed
from automodel_trainer.strategies.pipeline.schedule import (
    Work,
    build_schedule,
    check_micro_batches,
    order_of_work,
    stages_of,
)
from automodel_trainer.strategies.pipeline.split import Stage
from automodel_trainer.strategies.pipeline.stage import SplitModel

# how a place begins says the watchdog that it is one of a step
_WORDS = {"F": "forward", "B": "backward", "I": "backward (inputs)", "W": "backward (weights)"}


class StepRunner(Protocol):
    """What the pipeline asks of whoever trains through it."""

    def forward(self, stage: Stage, micro_batch: int, hidden: Tensor | None) -> Tensor:
        """Hidden states `[b, s, h]` of a stage; of the last one the loss to go backward from, `[1]`."""

    def around_backward(self, stage: Stage, micro_batch: int) -> AbstractContextManager[None]:
        """A context for one backward, or one half of it."""


class Pipeline:
    """This rank's place in a pipeline.

    Args:
        model: this rank's part of it.
        group: the ranks of the pipeline, in the order of their stages.
        device: that hidden states travel between.
        schedule: its name.
        per_rank: stages of a rank.
        whole_backward: gradients of weights are computed along with those of inputs, also where the schedule would do
            so later.
    """

    def __init__(
        self,
        model: SplitModel,
        group: ProcessGroup,
        device: torch.device,
        schedule: str,
        per_rank: int,
        whole_backward: bool = False,
    ) -> None:
        self.model, self.group, self.device = model, group, device
        self.schedule, self.per_rank, self.whole_backward = schedule, per_rank, whole_backward
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.clock = Clock(device)
        self._runner: StepRunner | None = None
        self._built: tuple[Any, Any] | None = None  # the last schedule, and what it was built for
        self._order: list[Work] = []
        self._position = 0
        self._computing = False

    @property
    def place(self) -> str:
        """What this rank is doing at this moment of a step, in words; empty between steps."""
        if self._position >= len(self._order):
            return ""
        work = self._order[self._position]
        what = f"{_WORDS[work.kind]} of micro-batch {work.micro_batch} on stage {work.stage}"
        before = work.stage - 1 if work.kind == "F" else work.stage + 1
        if self._computing or work.kind == "W" or not 0 <= before < len(self.model.split.stages):
            return what
        sent = "hidden states" if work.kind == "F" else "gradients"
        return f"{what}, waiting for {sent} from stage {before} (pipeline rank {self._owner(before)})"

    def step(self, runner: StepRunner, micro_batches: int, shape: tuple[int, int, int]) -> None:
        """Forward and backward of all micro-batches, whose hidden states have this `shape`.

        Raises:
            ValueError: the schedule cannot run this number of micro-batches.
        """
        wanted = (micro_batches, shape)
        if self._built is None or self._built[1] != wanted:
            self._built = None  # its buffers go before new ones come
            self._built = (self._build(micro_batches, shape), wanted)
        self._runner, self._position, self._computing = runner, 0, False
        enter_phase(self.place)
        index = torch.arange(micro_batches)
        self.clock.start()
        try:
            self._built[0].step(index=index, target=index, losses=[])
        except Exception as error:
            # torch wraps what a forward raises
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            cause.add_note(f"Pipeline rank {self.rank} of {self.ranks}: {self.place}.")
            raise cause from None
        finally:
            self._runner = None
        self._position = len(self._order)
        self.clock.stop()

    def _build(self, micro_batches: int, shape: tuple[int, int, int]) -> Any:
        check_micro_batches(self.schedule, self.ranks, self.per_rank, micro_batches)
        self._order = order_of_work(self.schedule, self.ranks, self.per_rank, micro_batches)[self.rank]
        hidden = torch.empty(shape, dtype=self.model.dtype, device="meta", requires_grad=True)
        nothing = torch.empty(0, device="meta")
        loss = torch.empty(1, device="meta", requires_grad=True)
        stages = [
            _TorchStage(
                _StageModule(stage, self),
                stage.index,
                len(self.model.split.stages),
                self.device,
                input_args=(nothing,) if stage.first else (hidden,),
                output_args=(loss,) if stage.last else (hidden,),
                group=self.group,
                dw_builder=_nothing_left if self.whole_backward else None,
            )
            for stage in self.model.split.own
        ]
        return build_schedule(self.schedule, stages, micro_batches, lambda loss, _: loss.sum())

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around everything that a stage computes."""
        self._computing = True
        enter_phase(self.place)
        with self.clock.busy():
            yield
        self._computing = False
        self._position += 1
        enter_phase(self.place or "step")

    def forward(self, stage: Stage, micro_batch: int, hidden: Tensor | None) -> Tensor:
        assert self._runner is not None
        output = self._runner.forward(stage, micro_batch, hidden)
        if stage.last:  # torch keeps the losses until the next step, and detaches what is no view from its graph
            return unviewed(output)
        if not output.requires_grad:  # nothing to train up to here; what is received for it is let go
            return output.detach().requires_grad_()
        return unviewed(output.contiguous())  # the halves of a split backward cannot be told apart through a view

    def around_backward(self, stage: Stage, micro_batch: int) -> AbstractContextManager[None]:
        assert self._runner is not None
        return self._runner.around_backward(stage, micro_batch)

    # --- without gradients ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, forward: Callable[[Stage, Tensor | None], Any], shape: tuple[int, int, int], shared: bool
    ) -> Any:
        """One micro-batch through all stages: what the last one gives, on its rank, else None. Collective.

        Args:
            forward: of one stage.
            shape: of the hidden states.
            shared: the last one gives a tensor, which all ranks shall have.
        """
        output: Any = None
        for stage in self.model.split.stages:
            owner = self._owner(stage.index)
            if self.rank == owner:
                output = forward(stage, output)
            if stage.last:
                output = output if self.rank == owner else None
                return self._broadcast(output, owner) if shared else output
            receiver = self._owner(stage.index + 1)
            if receiver != owner and self.rank == owner:
                dist.send(output.contiguous(), group=self.group, group_dst=receiver)
            elif receiver != owner and self.rank == receiver:
                output = torch.empty(shape, dtype=self.model.dtype, device=self.device)
                dist.recv(output, group=self.group, group_src=owner)
        raise AssertionError("there is a last stage")

    def from_last(self, compute: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What the rank of the last stage computes, of this shape, on every rank. Collective."""
        owner = self._owner(len(self.model.split.stages) - 1)
        if self.rank == owner:
            value = compute().to(dtype).reshape(shape).contiguous()
        else:
            value = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        dist.broadcast(value, group=self.group, group_src=owner)
        return value

    def _owner(self, stage: int) -> int:
        return next(r for r in range(self.ranks) if stage in stages_of(self.schedule, r, self.ranks, self.per_rank))

    def _broadcast(self, logits: Tensor | None, owner: int) -> Tensor:
        facts: list[Any] = [None if logits is None else (logits.shape, logits.dtype)]
        dist.broadcast_object_list(facts, group=self.group, group_src=owner, device=self.device)
        shape, dtype = facts[0]
        value = torch.empty(shape, dtype=dtype, device=self.device) if logits is None else logits.contiguous()
        dist.broadcast(value, group=self.group, group_src=owner)
        return value


class Clock:
    """Measures what share of a step a rank computes, without making the host wait for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self._whole: list[Any] = []

    def start(self) -> None:
        self._marks, self._whole = [], [self._now()]

    def stop(self) -> None:
        self._whole.append(self._now())

    @contextmanager
    def busy(self) -> Iterator[None]:
        begun = self._now()
        yield
        self._marks.append((begun, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> tuple[float, float] | None:
        """Of the last step: how long this rank computed, and how long it took; None before the first. Waits for the
        device."""
        if len(self._whole) < 2:
            return None
        return sum(self._between(*mark) for mark in self._marks), self._between(*self._whole)

    def bubble(self) -> float | None:
        """The share of the last step that this rank did not compute in; None before the first. Waits for the device."""
        seconds = self.seconds()
        return None if seconds is None else max(0.0, 1 - seconds[0] / seconds[1])

    def _between(self, start: Any, end: Any) -> float:
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


def _nothing_left() -> Callable[..., None]:
    """What torch's stage is to do for the gradients of weights after a backward that was whole."""
    return lambda: None


class _StageModule(nn.Module):
    """What torch's stage takes for its module. The model itself is no child of it: several stages share one."""

    def __init__(self, stage: Stage, pipeline: Pipeline) -> None:
        super().__init__()
        self.stage, self.pipeline = stage, pipeline

    def forward(self, hidden: Tensor | None = None, *, index: Tensor) -> Tensor:
        return self.pipeline.forward(self.stage, int(index), hidden)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.pipeline.model.parameters_of(self.stage)


class _TorchStage(PipelineStage):
    """torch's stage, with contexts around what it computes."""

    submod: _StageModule

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.submod.pipeline.computing():
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._backward(bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._backward(bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    @contextmanager
    def _backward(self, micro_batch: int) -> Iterator[None]:
        pipeline = self.submod.pipeline
        with pipeline.computing(), pipeline.around_backward(self.submod.stage, micro_batch):
            yield
