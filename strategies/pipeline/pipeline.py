"""One optimizer step through a pipeline, or one forward without gradients, on `torch.distributed.pipelining`."""

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

# The watchdog recognises the phases of a step by these first words.
_WORDS = {"F": "forward", "B": "backward", "I": "backward (inputs)", "W": "backward (weights)"}


class StepRunner(Protocol):
    """The callbacks of a training step that runs through the pipeline."""

    def forward(self, stage: Stage, micro_batch: int, hidden: Tensor | None) -> Tensor:
        """Run one stage on one micro-batch.

        Args:
            stage: the stage to run.
            micro_batch: index of the micro-batch.
            hidden: hidden states `[b, s, h]` from the stage before; None for the first stage.

        Returns:
            hidden states `[b, s, h]`; for the last stage the loss to call backward on, `[1]`.
        """

    def around_backward(self, stage: Stage, micro_batch: int) -> AbstractContextManager[None]:
        """A context around one backward, or around one half of a split backward."""


class Pipeline:
    """This rank's place in a pipeline.

    Args:
        model: this rank's part of the model.
        group: the ranks of the pipeline, in the order of their stages.
        device: this rank's device; hidden states are sent from it.
        schedule: name of the schedule.
        per_rank: stages per rank.
        whole_backward: do not split backwards even if the schedule does.
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
        self._built: tuple[Any, Any] | None = None  # torch's schedule, and the sizes it was built for
        self._order: list[Work] = []
        self._position = 0
        self._computing = False

    @property
    def place(self) -> str:
        """What this rank is doing at the moment, in words; empty between steps."""
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
        """Run forward and backward of all micro-batches.

        Args:
            runner: runs the stages.
            micro_batches: number of micro-batches.
            shape: shape `[b, s, h]` of the hidden states.

        Raises:
            ValueError: the schedule cannot run this number of micro-batches.
        """
        wanted = (micro_batches, shape)
        if self._built is None or self._built[1] != wanted:
            self._built = None  # free the old buffers before new ones are allocated
            self._built = (self._build(micro_batches, shape), wanted)
        self._runner, self._position, self._computing = runner, 0, False
        enter_phase(self.place)
        # torch splits its inputs into micro-batches. It gets their indices; `runner` holds the data.
        index = torch.arange(micro_batches)
        self.clock.start()
        try:
            self._built[0].step(index=index, target=index, losses=[])
        except Exception as error:
            # torch wraps the exceptions of a forward. Raise the original, with this rank's place in the step.
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            cause.add_note(f"Pipeline rank {self.rank} of {self.ranks}: {self.place}.")
            raise cause from None
        finally:
            self._runner = None
        self._position = len(self._order)
        self.clock.stop()

    def _build(self, micro_batches: int, shape: tuple[int, int, int]) -> Any:
        """torch's schedule over this rank's stages, for hidden states of this shape."""
        check_micro_batches(self.schedule, self.ranks, self.per_rank, micro_batches)
        self._order = order_of_work(self.schedule, self.ranks, self.per_rank, micro_batches)[self.rank]
        # torch needs only the shapes and dtypes of what stages exchange
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
        """A context around everything that a stage computes."""
        self._computing = True
        enter_phase(self.place)
        with self.clock.busy():
            yield
        self._computing = False
        self._position += 1
        enter_phase(self.place or "step")

    def forward(self, stage: Stage, micro_batch: int, hidden: Tensor | None) -> Tensor:
        """Run one stage for torch and return an output that torch can handle: `[b, s, h]`, or the loss `[1]`.

        The arguments are those of `StepRunner.forward`.
        """
        assert self._runner is not None
        output = self._runner.forward(stage, micro_batch, hidden)
        if stage.last:  # torch keeps the losses until the next step and detaches them in place, which a view forbids
            return unviewed(output)
        if not output.requires_grad:  # nothing is trained up to here; the gradient that torch receives is dropped
            return output.detach().requires_grad_()
        return unviewed(output.contiguous())  # torch cannot split the backward of a view into its two halves

    def around_backward(self, stage: Stage, micro_batch: int) -> AbstractContextManager[None]:
        """See `StepRunner.around_backward`."""
        assert self._runner is not None
        return self._runner.around_backward(stage, micro_batch)

    # --- without gradients ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, forward: Callable[[Stage, Tensor | None], Any], shape: tuple[int, int, int], shared: bool
    ) -> Any:
        """Run one micro-batch through all stages without gradients. Collective.

        Args:
            forward: runs one stage on hidden states `[b, s, h]`, or on None for the first stage.
            shape: shape `[b, s, h]` of the hidden states.
            shared: broadcast the last stage's output, a tensor, to all ranks.

        Returns:
            the last stage's output; on other ranks None, unless `shared`.
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
        raise AssertionError("no stage is the last one")

    def from_last(self, compute: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Compute a tensor on the last stage's rank and broadcast it. Collective.

        Args:
            compute: called on the last stage's rank.
            shape, dtype: those of the result.
        """
        owner = self._owner(len(self.model.split.stages) - 1)
        if self.rank == owner:
            value = compute().to(dtype).reshape(shape).contiguous()
        else:
            value = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        dist.broadcast(value, group=self.group, group_src=owner)
        return value

    def _owner(self, stage: int) -> int:
        """The pipeline rank that holds a stage."""
        return next(r for r in range(self.ranks) if stage in stages_of(self.schedule, r, self.ranks, self.per_rank))

    def _broadcast(self, logits: Tensor | None, owner: int) -> Tensor:
        """Broadcast the owner's tensor, whose shape the other ranks do not know."""
        facts: list[Any] = [None if logits is None else (logits.shape, logits.dtype)]
        dist.broadcast_object_list(facts, group=self.group, group_src=owner, device=self.device)
        shape, dtype = facts[0]
        value = torch.empty(shape, dtype=dtype, device=self.device) if logits is None else logits.contiguous()
        dist.broadcast(value, group=self.group, group_src=owner)
        return value


class Clock:
    """Measures the share of a step in which a rank computes, without a host/device sync during the step."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []  # (start, end) of everything computed
        self._whole: list[Any] = []  # start and end of the step

    def start(self) -> None:
        """Call it when a step starts."""
        self._marks, self._whole = [], [self._now()]

    def stop(self) -> None:
        """Call it when a step ends."""
        self._whole.append(self._now())

    @contextmanager
    def busy(self) -> Iterator[None]:
        """A context around everything that the rank computes."""
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
        """The time that this rank computed in the last step, and the time of the whole step.

        None before the first step. This is a host/device sync.
        """
        if len(self._whole) < 2:
            return None
        return sum(self._between(*mark) for mark in self._marks), self._between(*self._whole)

    def bubble(self) -> float | None:
        """The share of the last step in which this rank waited; None before the first step. A host/device sync."""
        seconds = self.seconds()
        return None if seconds is None else max(0.0, 1 - seconds[0] / seconds[1])

    def _between(self, start: Any, end: Any) -> float:
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000  # CUDA reports milliseconds


def _nothing_left() -> Callable[..., None]:
    """For torch's stage: there is nothing left to do for the weights' gradients after a whole backward."""
    return lambda: None


class _StageModule(nn.Module):
    """The module of a torch stage. The model is not a child of it, because several stages share one model."""

    def __init__(self, stage: Stage, pipeline: Pipeline) -> None:
        super().__init__()
        self.stage, self.pipeline = stage, pipeline

    def forward(self, hidden: Tensor | None = None, *, index: Tensor) -> Tensor:
        return self.pipeline.forward(self.stage, int(index), hidden)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.pipeline.model.parameters_of(self.stage)


class _TorchStage(PipelineStage):
    """torch's stage, with our contexts around everything that it computes."""

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
