"""Parallel3DStrategy: pipeline stages, each of them laid out by FSDP2, tensor, sequence and context parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import CausalLMOutputWithPast

from automodel_trainer.distributed._dtensor import local_tensor
from automodel_trainer.distributed.mesh import ParallelDims
from automodel_trainer.models.stage_names import mark, pipeline_of
from automodel_trainer.nn.flops import keep_training_cost
from automodel_trainer.nn.step_cache import unchanged_weights
from automodel_trainer.strategies.base.clip import clip_grads_, total_grad_norm
from automodel_trainer.strategies.base.mesh_strategy import MicroBatch, Objective, Part
from automodel_trainer.strategies.base.objective import marked_part, unmarked
from automodel_trainer.strategies.data_parallel._fsdp import initialize_sharding, reduce_gradients
from automodel_trainer.strategies.data_parallel.fsdp2 import FSDP2Strategy
from automodel_trainer.strategies.data_parallel.shard import is_laid_out
from automodel_trainer.strategies.inner_parallel import forward_for_loss
from automodel_trainer.strategies.pipeline.batches import same_shape
from automodel_trainer.strategies.pipeline.beside import with_loss
from automodel_trainer.strategies.pipeline.picture import legend, schedule_facts, text_picture
from automodel_trainer.strategies.pipeline.pipeline import Pipeline
from automodel_trainer.strategies.pipeline.rehearsal import check_stages
from automodel_trainer.strategies.pipeline.schedule import (
    check_micro_batches,
    min_micro_batches,
    schedule_kind,
    stages_of,
    stages_per_rank,
)
from automodel_trainer.strategies.pipeline.split import (
    ModelParts,
    Stage,
    balanced_counts,
    even_counts,
    find_parts,
    layer_costs,
    split_model,
    stage_costs,
)
from automodel_trainer.strategies.pipeline.stage import SplitModel, Turn


class Parallel3DStrategy(FSDP2Strategy):
    """Pipeline parallel, with FSDP2/HSDP, tensor, sequence and context parallel inside every stage.

    The layers of a decoder are split over `pp` ranks (or groups of ranks), and the micro-batches of a global batch run
    through them one after another. A rank builds and reads only what its stages hold, under the model's own names.

    Args:
        pp: ranks that the layers are split over.
        dp_shard, dp_replicate, cp, tp: the layout of every stage; see `FSDP2Strategy`, also for the other arguments.
        schedule: the order in which stages work: 1f1b, gpipe, interleaved_1f1b, looped_bfs, interleaved_zero_bubble,
            zbv, dualpipev.
        virtual_stages: stages per rank; None: 2 for the schedules that have several, else 1.
        split: the number of layers of every stage. "auto" makes the most expensive stage as cheap as possible; cost is
            the number of weights that a token is multiplied with, including the head. None: as equal as possible.
        reshard_after_forward: see `FSDP2Strategy`. False, the default, keeps gathered parameters for all micro-batches
            of a step; with True each micro-batch gathers them again.

    Source: `torch.distributed.pipelining`; `schedule.SCHEDULES` names the schedules' papers.

    Raises:
        ValueError: the schedule, `virtual_stages` or `split` is unknown, or they do not fit each other.
    """

    def __init__(
        self,
        pp: int = 2,
        dp_shard: int = -1,
        dp_replicate: int = 1,
        *,
        cp: int | Literal["auto"] = 1,
        tp: int | Literal["auto"] = 1,
        schedule: str = "1f1b",
        virtual_stages: int | None = None,
        split: Sequence[int] | Literal["auto"] | None = None,
        reshard_after_forward: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dp_shard, dp_replicate, cp=cp, tp=tp, reshard_after_forward=reshard_after_forward, **kwargs)
        dims: ParallelDims = self.requested_dims
        self.requested_dims = replace(dims, pp=pp)
        if self.memory is not None and pp > 1:
            self.memory.refuse(f"pp={pp}")
        self.schedule = schedule.lower()
        self.stages_per_rank = stages_per_rank(self.schedule, virtual_stages)
        self.split = split if isinstance(split, str) or split is None else list(split)
        if isinstance(self.split, str) and self.split != "auto":
            raise ValueError(
                f"split={split!r} is unknown. Allowed: the number of layers of every stage ([8, 9, 9, 6]), 'auto', or "
                "None."
            )
        self._pipeline: Pipeline | None = None
        self._stage_costs: list[float] | None = None
        self._share_logits = True  # whether a forward outside of training gives its logits to all ranks

    def ineffective_options(self) -> list[str]:
        """See `MeshProcesses.ineffective_options`."""
        idle = super().ineffective_options()
        if self.requested_dims.pp == 1:
            asked = {
                "schedule": self.schedule != "1f1b",
                "virtual_stages": self.stages_per_rank > 1,
                "split": self.split,
            }
            return idle + [f"{name} with pp=1 (there is one stage)" for name, given in asked.items() if given]
        if self.splits_backward:
            asked = {n: getattr(self, n) for n in ("sync_every_micro_batch", "reshard_after_forward")}
            why = f"schedule={self.schedule!r} (it keeps parameters and gradients gathered until the end of the step)"
            idle += [f"{name}=True with {why}" for name, given in asked.items() if given is True]
        return idle

    def forget_run(self) -> None:
        """See `MeshStrategy.forget_run`."""
        super().forget_run()
        self._pipeline = None

    @property
    def min_layers(self) -> int:
        """One layer per stage, or the sum of `split`."""
        return sum(self.split) if isinstance(self.split, list) else self.requested_dims.pp * self.stages_per_rank

    @property
    def min_micro_batches(self) -> int:
        """The smallest number of micro-batches that the schedule runs."""
        return min_micro_batches(self.schedule, self.requested_dims.pp, self.stages_per_rank)

    # --- laying out ---------------------------------------------------------------------------------------------------

    @property
    def pipeline(self) -> Pipeline | None:
        """This rank's place in the pipeline; None until a model is split into more than one stage."""
        return self._pipeline

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs and of weights are computed at different times.

        A schedule that splits backwards runs whole ones if splitting costs more than it saves: under activation
        checkpointing and with tiles each half would recompute the block. With `compile=True` the backward of a block is
        one piece.
        """
        whole = self.activation_checkpointing is not None or self.tiled_mlp is not False or self.compile is True
        return schedule_kind(self.schedule).splits_backward and not whole

    @property
    def compiles(self) -> bool:
        """See `MeshStrategy.compiles`. False if backwards are split, which a compiled block does not allow."""
        return False if self.splits_backward else super().compiles

    def describe_pipeline(self, micro_batches: int) -> dict[str, Any] | None:
        """Describe the schedule of a step: a picture, the layers per stage, and the share of time that ranks wait.

        The share is computed from the stages' weights and does not include the time to send. None without a pipeline.

        Args:
            micro_batches: per optimizer step.
        """
        if self._pipeline is None:
            return None
        whole = not self.splits_backward
        sizes = (self.schedule, self.dims.pp, self.stages_per_rank, micro_batches)
        _, bubble = schedule_facts(*sizes, self._stage_costs, whole_backward=whole)
        even, _ = schedule_facts(*sizes, whole_backward=whole)
        layers = [len(stage.layers) for stage in self._pipeline.model.split.stages]
        return {
            "schedule": self.schedule,
            "layers": layers,
            "micro_batches": micro_batches,
            "bubble": bubble,
            "picture": text_picture(even),
            "legend": legend(even),
        }

    def measured_bubble(self) -> float | None:
        """The share of the last step in which this rank waited; None before the first step. A host/device sync."""
        return self._pipeline.clock.bubble() if self._pipeline is not None else None

    def parallelize(self, model: nn.Module) -> nn.Module:
        """Split `model` into stages, then lay this rank's stages out as `FSDP2Strategy` does, in place.

        Raises:
            ValueError: the model cannot be split this way, or this layout does not fit it.
        """
        if self.dims.pp == 1 or is_laid_out(model):
            return super().parallelize(model)
        if self._splits(model):
            return model
        self.shards.waits_for = f"schedule={self.schedule!r}" if self.splits_backward else None
        self.broadcast_from_rank_zero(model)
        self.size_experts(model)
        self._split_layers(model)
        self.allow_async_tp()
        self.checkpoint_activations(model, before_tp=True)
        self.compile_model(model)
        self.split_sequences(model)
        self.split_experts(model)
        self.cut_matrices(model)
        self.checkpoint_activations(model, before_tp=False)
        self.shard(model)
        return model

    def _split_layers(self, model: nn.Module) -> None:
        """Remove other ranks' stages from `model`, in place, and make its forward run the pipeline."""
        parts = find_parts(model)
        check_stages(model)
        counts = self._counts(model, parts)
        self._stage_costs = stage_costs(model, parts, counts)
        _check_trainable(model, parts, counts)
        group = self.device_mesh["pp"].get_group()
        own = stages_of(self.schedule, dist.get_rank(group), self.dims.pp, self.stages_per_rank)
        keep_training_cost(model)  # FLOPs are counted for the whole model, so before layers are removed
        split = split_model(model, parts, counts, own)
        stage_model = SplitModel(model, split, self.dtypes.compute, partial(self._whole_forward, model))
        self._pipeline = Pipeline(
            stage_model,
            group,
            self.root_device,
            self.schedule,
            self.stages_per_rank,
            whole_backward=not self.splits_backward,
        )
        mark(model, self._pipeline)
        if hasattr(model, "generate"):  # a key/value cache would hold the layers of one stage only
            generate: Any = model.generate
            model.generate = partial(generate, use_cache=False)  # type: ignore[assignment]

    def _pipeline_of(self, model: nn.Module) -> Pipeline | None:
        """The pipeline of this model, where the strategy has laid out several."""
        found = pipeline_of(model)
        return found if isinstance(found, Pipeline) else self._pipeline

    def _splits(self, model: nn.Module) -> bool:
        """Whether `model` has been split already."""
        return pipeline_of(model) is not None

    def _counts(self, model: nn.Module, parts: ModelParts) -> list[int]:
        """The number of layers of every stage."""
        layers = len(model.get_submodule(parts.layers))  # type: ignore[arg-type]
        stages = self.dims.pp * self.stages_per_rank
        if stages > layers:
            one_each = "" if self.stages_per_rank == 1 else f", up to {layers} with schedule='1f1b'"
            raise ValueError(
                f"{stages} stages (pp={self.dims.pp} × {self.stages_per_rank} per rank) need at least {stages} layers, "
                f"and {type(model).__name__} has {layers}. Allowed: pp up to {layers // self.stages_per_rank} with "
                f"schedule={self.schedule!r}{one_each}."
            )
        if self.split is None:
            return even_counts(layers, stages)
        if self.split == "auto":
            costs, first, last = layer_costs(model, parts)
            return balanced_counts(costs, first, last, stages)
        counts = [int(n) for n in self.split]
        if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
            raise ValueError(
                f"split={counts} does not fit: it must give each of the {stages} stages at least one layer, {layers} "
                f"in all. Set split={even_counts(layers, stages)}, for example, or 'auto'."
            )
        return counts

    def lay_out_user_module(self, module: pl.LightningModule) -> None:
        """See `FSDP2Strategy.lay_out_user_module`.

        Raises:
            ValueError: pp > 1: the strategy must run the step itself.
        """
        if self.dims.pp > 1:
            raise ValueError(
                f"pp={self.dims.pp} can run a CausalLMModule (or any module with `model`, `split` and `loss`) stage by "
                f"stage; {type(module).__name__} calls its model itself. Use strategy='fsdp2'."
            )
        super().lay_out_user_module(module)

    # --- training -----------------------------------------------------------------------------------------------------

    def forward_backward(self, objective: Objective, micro_batches: Sequence[MicroBatch], num_tokens: Tensor) -> Tensor:
        """See `StepRunner.forward_backward`. Micro-batches run through the pipeline in the order of the schedule.

        Raises:
            ValueError: the schedule cannot run this number of micro-batches, an input cannot be padded or split, or the
                tensor-parallel plan is wrong.
        """
        pipeline = self._pipeline = self._pipeline_of(objective.model)
        if pipeline is None:
            return super().forward_backward(objective, micro_batches, num_tokens)
        check_micro_batches(self.schedule, self.dims.pp, self.stages_per_rank, len(micro_batches))
        parts = same_shape([marked_part(objective, micro_batch) for micro_batch in micro_batches])
        scale = self.gradient_scale / num_tokens.clamp(min=1)
        step = _Step(self, objective, parts, scale, torch.zeros((), device=self.root_device))
        step.prepare()
        with unchanged_weights(), objective.in_step(self, micro_batches, num_tokens):
            pipeline.step(step, len(parts), self._hidden_shape(parts[0]))
        step.finish()
        self._share_tied_gradients(objective.model)
        dist.all_reduce(step.total, group=pipeline.group)  # the last stage's rank has the loss of the logits
        self.check_replicas_once(objective.model)
        return step.total

    def _hidden_shape(self, part: Part) -> tuple[int, int, int]:
        """The shape `[b, s / cp, h]` of the hidden states that are sent between stages."""
        assert self._pipeline is not None
        rows, length = part[0]["input_ids"].shape
        return rows, self.shard_length(length), self._pipeline.model.width

    @torch.no_grad()
    def _share_tied_gradients(self, model: nn.Module) -> None:
        """Sum the gradients of weights that the first and the last stage share, on both of their ranks."""
        assert self._pipeline is not None
        split, group = self._pipeline.model.split, self._pipeline.group
        if not split.shared or not (split.holds_first or split.holds_last):
            return
        other = self.dims.pp - 1 if split.holds_first else 0
        for parameter in _named(model, split.shared):
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:  # the other end waits for a message anyway
                parameter.grad = torch.zeros_like(parameter)
            mine = local_tensor(parameter.grad)
            theirs = torch.empty_like(mine)
            operations = [
                dist.P2POp(dist.isend, mine.contiguous(), group=group, group_peer=other),
                dist.P2POp(dist.irecv, theirs, group=group, group_peer=other),
            ]
            if mine.numel():
                for work in dist.batch_isend_irecv(operations):
                    work.wait()
                mine += theirs

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
        """See `StepRunner.clip_grad_norm_`. The norm, 0-dim, covers all stages."""
        pipeline = self._pipeline
        if pipeline is None:
            return super().clip_grad_norm_(parameters, max_norm)
        parameters = list(parameters)
        split = pipeline.model.split
        twice = split.shared if split.holds_last else ()  # the first stage counts the shared weights
        left_out = {id(p) for p in _named(pipeline.model.model, twice)}
        square = total_grad_norm(p for p in parameters if id(p) not in left_out).to(self.root_device).square()
        dist.all_reduce(square, group=pipeline.group)
        norm = square.sqrt()
        if max_norm:
            clip_grads_(parameters, max_norm, norm)
        return norm

    # --- evaluating ---------------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Run one forward of the model. Split models run all stages, without gradients.

        The logits stay on the last stage's rank and are None elsewhere; `from_logits` works with them.
        """
        self._share_logits = False
        try:
            return super().forward(model, inputs)
        finally:
            self._share_logits = True

    def sum_over_stages(self, tensor: Tensor) -> Tensor:
        """See `StepRunner.sum_over_stages`."""
        if self.dims.pp > 1:
            dist.all_reduce(tensor, group=self.device_mesh["pp"].get_group())
        return tensor

    def from_logits(self, compute: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `StepRunner.from_logits`. The last stage's rank computes, and the others get its result."""
        if self._pipeline is None:
            return super().from_logits(compute, shape, dtype)
        return self._pipeline.from_last(compute, shape, dtype)

    def _whole_forward(self, whole: nn.Module, inputs: dict[str, Any]) -> Any:
        """Run one micro-batch through all stages. It is called for forwards of the model outside of a training step."""
        pipeline = pipeline_of(whole)  # a reference model, say, has one of its own
        assert isinstance(pipeline, Pipeline)
        if torch.is_grad_enabled():
            raise ValueError(
                "A model in pipeline stages can be called as a whole only without gradients. Use torch.no_grad(), or "
                "strategy.forward_backward for training."
            )
        if inputs.get("past_key_values") is not None or inputs.get("input_ids") is None:
            raise ValueError(
                "A model in pipeline stages needs input_ids and supports no cache. Pass input_ids, and set "
                "use_cache=False."
            )
        model = pipeline.model
        inputs = {**inputs, "use_cache": False}

        def forward(stage: Stage, hidden: Tensor | None) -> Any:
            output = model.run_inside(Turn(stage, hidden), inputs)
            return output.logits if stage.last else output

        shape = (*inputs["input_ids"].shape, model.width)
        return CausalLMOutputWithPast(logits=pipeline.evaluate(forward, shape, self._share_logits))


@dataclass
class _Step:
    """The work that the pipeline runs in one optimizer step (a `pipeline.StepRunner`).

    Args:
        strategy, objective: see `StepRunner.forward_backward`.
        parts: inputs and targets of every micro-batch, all of one shape.
        scale: factor on the loss, 0-dim.
        total: the sum of token losses, 0-dim; it grows in place.
    """

    strategy: Parallel3DStrategy
    objective: Objective
    parts: list[Part]
    scale: Tensor
    total: Tensor

    def forward(self, stage: Stage, micro_batch: int, hidden: Tensor | None) -> Tensor:
        """See `pipeline.StepRunner.forward`."""
        pipeline, model = self.strategy.pipeline, self.objective.model
        assert pipeline is not None
        with self.strategy.split_sequence(*self.parts[micro_batch]) as (inputs, own):
            targets, marks = unmarked(own)
            turn = Turn(stage, hidden)
            output = pipeline.model.run(turn, lambda: forward_for_loss(model, inputs))
            beside = self.objective.side_loss(marks)
            if beside is not None:
                self.total += beside.detach()
            if not stage.last:
                return output if beside is None else with_loss(output, beside * self.scale)
            loss = self.objective.loss(output, targets)
        self.total += loss.detach()
        loss = loss if beside is None else loss + beside
        return (loss * self.scale).float().reshape(1)  # the shape and dtype that `Pipeline` told torch

    @contextmanager
    def around_backward(self, stage: Stage, micro_batch: int) -> Iterator[None]:
        """See `pipeline.StepRunner.around_backward`."""
        # With several stages per rank, the index does not tell which backward is the last. `finish` then reduces.
        last = micro_batch == len(self.parts) - 1 and not schedule_kind(self.strategy.schedule).looped
        if last:
            self._sync(True)
        # Attention that is recomputed in backward needs this micro-batch's split again.
        with self.strategy.split_sequence(*self.parts[micro_batch]) if self.strategy.dims.cp > 1 else nullcontext():
            yield

    def prepare(self) -> None:
        """Before the first micro-batch: let FSDP2 find its units, and stop it from reducing gradients."""
        model = self.objective.model
        if isinstance(model, FSDPModule):
            initialize_sharding(model)
            self._sync(False)

    def finish(self) -> None:
        """After the last micro-batch: reduce gradients, unless the last backward did."""
        if isinstance(self.objective.model, FSDPModule) and schedule_kind(self.strategy.schedule).looped:
            reduce_gradients(self.objective.model)

    def _sync(self, last: bool) -> None:
        """Tell FSDP2 whether to reduce gradients and free parameters in the backwards to come."""
        model = self.objective.model
        if isinstance(model, FSDPModule):
            # A split backward runs the weights' half later, when the parameters must still be gathered.
            keep = self.strategy.splits_backward or not self.strategy.reshard_after_forward
            model.set_requires_gradient_sync(last or self.strategy.shards.syncs_every_micro_batch)
            model.set_is_last_backward(last)
            model.set_reshard_after_backward(last or not keep)


def _named(model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """The parameters of these names."""
    return [model.get_parameter(name) for name in names]


def _check_trainable(model: nn.Module, parts: ModelParts, counts: Sequence[int]) -> None:
    """Check that every stage has something to train: every rank has an optimizer."""
    start = 0
    for index, count in enumerate(counts):
        names = [f"{parts.layers}.{i}" for i in range(start, start + count)]
        names += [*(parts.before if index == 0 else ()), *(parts.after if index == len(counts) - 1 else ())]
        start += count
        if not any(p.requires_grad for name in names for p in model.get_submodule(name).parameters()):
            raise ValueError(
                f"Stage {index} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}) has nothing to train. Train "
                "something in every stage (for example LoRA in all layers), set another split, or lower pp."
            )
