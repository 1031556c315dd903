"""Try steps of the largest micro-batch, read what they take, and choose how blocks keep their activations.

Afterwards everything is as if no step had been tried: gradients, random numbers, buffers.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median_high
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from automodel_trainer.checkpoint.rng import rng_state, set_rng_state
from automodel_trainer.distributed.agreement import gather
from automodel_trainer.distributed.phase import during_phase
from automodel_trainer.nn.device_memory import DeviceMemory
from automodel_trainer.nn.tiles import TILE, Count
from automodel_trainer.strategies.base.block_modes import Mode, modes_of_blocks, text_of
from automodel_trainer.strategies.base.budget import Chosen, gib
from automodel_trainer.strategies.base.mesh_strategy import MeshStrategy
from automodel_trainer.strategies.base.objective import MicroBatch, count_all
from automodel_trainer.strategies.base.search import Key, Plan, Trial, search
from automodel_trainer.strategies.base.state_bytes import missing_state_bytes
from automodel_trainer.strategies.base.together import RanOutElsewhere, Stuck, Together

FEW_TILES = 4  # where a micro-batch is too short for tiles of TILE tokens
Place = tuple[str, int, int]
"""Where a trial ended: whether ranks could stop there together; how many blocks, and backwards of blocks, had begun."""
DONE: Place = ("done", 0, 0)


def choose_for_budget(
    strategy: MeshStrategy, objective: Any, steps: Sequence[Sequence[MicroBatch]], memory: DeviceMemory
) -> Chosen:
    """Let the strategy's blocks keep their activations in the fastest way that fits its budget. Collective.

    Args:
        strategy: has laid the objective's model out, and has its optimizers.
        objective: the module to train.
        steps: micro-batches of an optimizer step, on the host: those that take the most memory.
        memory: counts what this rank's device holds.

    Raises:
        ValueError: nothing fits; or the device ran out of memory on some ranks where others wait for them.
    """
    assert strategy.memory is not None
    budget = min(gather(min(strategy.memory.bytes_of(memory.total), memory.room)))
    together = Together(strategy.timeout)
    trials = _Trials(strategy, objective, steps, memory, together)
    ladder: tuple[Mode | None, ...] = (None, "full", "offload")
    if not strategy.compiles:  # a compiler chooses by itself what to keep, as "selective" does
        ladder = (None, "selective", "full", "offload")
    try:
        with during_phase("memory"):
            found, tried = search(trials.kinds, ladder, strategy.prepared.mlps > 0, budget, trials.measure)
            strategy.choose(None if found is None else trials.setting(found.plan))
            strategy.forget_interrupted(objective.model)  # DDP has ordered its buckets anew
            if strategy.prepared.host is not None:
                strategy.prepared.host.release()
            memory.restart()
        together.close()
    finally:
        together.stop()
    if found is None:
        raise ValueError(_nothing_fits(strategy, trials, tried, budget))
    assert found.peak is not None
    modes, tiles = trials.setting(found.plan).modes, trials.setting(found.plan).tiles
    chosen = Chosen(
        modes,
        tiles,
        blocks=len(trials.kinds),
        recomputed=sum(mode in ("full", "offload") for mode in found.plan.modes),
        in_part=found.plan.modes.count("selective"),
        peak=found.peak,
        budget=budget,
        host=trials.host.get(found.plan, 0),
        tokens=trials.tokens,
        trials=len(tried),
    )
    strategy.chosen = chosen
    rank_zero_info(f"memory={strategy.memory.given!r} chose {chosen}.")
    return chosen


class _Trials:
    """Runs steps with plans.

    Attributes:
        kinds: of the blocks, in the order of the model.
        tokens: of the largest micro-batch.
        host: bytes of host memory that plans took.
    """

    def __init__(
        self,
        strategy: MeshStrategy,
        objective: Any,
        steps: Sequence[Sequence[MicroBatch]],
        memory: DeviceMemory,
        together: Together,
    ) -> None:
        self.strategy, self.objective, self.memory, self.together = strategy, objective, memory, together
        self.steps = [strategy.batch_to_device(list(step), strategy.root_device) for step in steps]
        self.tokens = max(batch["input_ids"].numel() for step in steps for batch in step)
        self.blocks = list(strategy.prepared.switches)
        self.kinds: list[Hashable] = [_kind(block) for block in self.blocks]
        self.missing = missing_state_bytes(strategy.optimizers, strategy.root_device)
        self.host: dict[Plan, int] = {}

    def setting(self, plan: Plan) -> Chosen:
        """What the strategy is told of a plan."""
        count: Count = "auto" if self.tokens // self.strategy.dims.cp > 2 * TILE else FEW_TILES
        return Chosen(text_of(plan.modes), count if plan.tiled else None)

    def measure(self, plan: Plan) -> Trial:
        """Run the steps with a plan. Collective: all ranks get what the worst of them had.

        Raises:
            ValueError: the ranks ended at different places, or some cannot come to its end.
        """
        if self.strategy.prepared.host is not None:
            self.strategy.prepared.host.release()
        self.strategy.choose(self.setting(plan))
        assert plan.modes == tuple(modes_of_blocks(self.strategy.block_modes, len(self.blocks)))
        self.memory.restart()
        try:
            place, kept = self._run()
        except Stuck as stuck:
            raise ValueError(self._apart(plan, [stuck.rank])) from stuck
        peak = self.memory.peak() + self.missing
        host = self.strategy.prepared.host
        everywhere = gather((place, peak, kept, 0 if host is None else host.held))
        places = {found[0] for found in everywhere}
        if len(places) > 1:
            raise ValueError(self._apart(plan, [rank for rank, found in enumerate(everywhere) if found[0] != DONE]))
        self.host[plan] = max(found[3] for found in everywhere)
        worst = max(found[1] for found in everywhere)
        most = {key: max(found[2].get(key, 0) for found in everywhere) for found in everywhere for key in found[2]}
        trial = Trial(plan, worst if places == {DONE} else None, most)
        took = "ran out of memory" if trial.peak is None else f"took {gib(worst)}"
        rank_zero_info(f"memory: a step with {self.setting(plan).setting} {took}.")
        return trial

    def _apart(self, plan: Plan, ranks: Sequence[int]) -> str:
        assert self.strategy.memory is not None
        return (
            f"memory={self.strategy.memory.given!r}: some ranks ran out of memory in a trial "
            f"({self.setting(plan).setting}) while others waited for them, or at different places: "
            f"{', '.join(f'rank {rank}' for rank in ranks)}. They cannot go on together. Give less, such as "
            "memory=70%, or set activation_checkpointing yourself."
        )

    def _run(self) -> tuple[Place, dict[Key, int]]:
        """Run the steps.

        Returns:
            DONE, or where memory ran out; and what blocks keep.

        Raises:
            Stuck: memory ran out on one rank, and others wait for it in a collective.
        """
        strategy, model = self.strategy, self.objective.model
        dims = strategy.dims
        inner = dims.tp * dims.cp > 1 or strategy.expert_ranks != 1  # blocks have collectives of their own
        meter = _Meter(self.blocks, self.memory, self.together, inner)
        place = DONE
        self.together.begin()
        with unchanged(self.objective), meter.reading(self.objective):
            try:
                for step in self.steps:
                    tokens = strategy.sum_over_rows(count_all(self.objective, step))
                    with strategy.precision_plugin.train_step_context():
                        strategy.forward_backward(self.objective, step, tokens)
                    _forget_gradients(self.objective)
                    meter.end_step()
            except torch.OutOfMemoryError as error:
                place = meter.place
                traceback.clear_frames(error.__traceback__)  # which hold what the step has computed
                if not isinstance(error, RanOutElsewhere):
                    self.together.ran_out()
            except RuntimeError as error:
                self.together.explain(error)
                raise
        if place != DONE:
            gc.collect()
            strategy.forget_interrupted(model)
            _forget_gradients(self.objective)
        modes = [strategy.prepared.switches[block].mode for block in self.blocks]
        found: dict[Key, list[int]] = {}
        for index, size in meter.kept.items():
            found.setdefault((self.kinds[index], modes[index]), []).append(size)
        return place, {key: median_high(sizes) for key, sizes in found.items()}


class _Meter:
    """Reads how many bytes a block keeps, at the ends of its first forward; lets ranks look before each block.

    A rank that runs out of memory in a forward between two collectives has begun the same ones as the others, which
    learn it before the next: all can go on with another trial.

    Args:
        blocks: of the model.
        memory: of this rank.
        together: the ranks.
        inner: whether a forward of a block has collectives.
    """

    def __init__(self, blocks: Sequence[nn.Module], memory: DeviceMemory, together: Together, inner: bool) -> None:
        self.blocks, self.memory, self.together, self.inner = blocks, memory, together, inner
        self.kept: dict[int, int] = {}
        self._before: dict[int, int] = {}
        self._begun = self._returned = 0  # forwards and backwards of blocks
        self._between = False  # no collective of the model is begun until the ranks look again

    @property
    def place(self) -> Place:
        """Where this rank is."""
        return "between" if self._between and not self.inner else "inside", self._begun, self._returned

    @contextmanager
    def reading(self, objective: Any) -> Iterator[None]:
        """A context in which forwards are watched."""
        with ExitStack() as handles:
            for index, block in enumerate(self.blocks):
                # before FSDP2 gathers the block, once it has, and after it has freed it
                hooks = (
                    block.register_forward_pre_hook(partial(self._begin, index), prepend=True),
                    block.register_forward_pre_hook(self._gathered),
                    block.register_forward_hook(partial(self._end, index)),
                )
                for hook in hooks:
                    handles.callback(hook.remove)
            handles.callback(_put_back, objective, objective.__dict__.get("loss"))  # most have only that of their class
            objective.loss = partial(self._loss, objective.loss)
            yield

    def end_step(self) -> None:
        """Let ranks look once more. One that is still in its backward is elsewhere."""
        self._returned += 1
        self.together.look()

    def _look(self) -> None:
        self._between = not self.inner  # so are ranks that learn it here
        self.together.look()
        self._between = False

    def _begin(self, index: int, *_: Any) -> None:
        self._look()
        self._begun += 1
        self._before.setdefault(index, self.memory.allocated())

    def _gathered(self, *_: Any) -> None:
        self._between = True

    def _end(self, index: int, block: nn.Module, args: Any, output: Any) -> None:
        self.kept.setdefault(index, self.memory.allocated() - self._before[index])
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(self._returns)

    def _loss(self, loss: Callable[..., Tensor], *args: Any) -> Tensor:
        found = loss(*args)
        self._look()
        return found

    def _returns(self, gradient: Tensor) -> None:
        self._returned += 1


def _put_back(objective: Any, loss: Any) -> None:
    del objective.loss
    if loss is not None:
        objective.loss = loss


@contextmanager
def unchanged(objective: Any) -> Iterator[None]:
    """A context after which random generators and buffers are as they were before."""
    states = rng_state()
    buffers = [
        (module, name, buffer, buffer._version, buffer.detach().to("cpu", copy=True))
        for module in objective.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    try:
        yield
    finally:
        for module, name, buffer, version, values in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(values)
            module._buffers[name] = buffer
        set_rng_state(states)


def _forget_gradients(objective: nn.Module) -> None:
    for parameter in objective.parameters():
        parameter.grad = None


def _kind(block: nn.Module) -> Hashable:
    return type(block).__name__, sum(parameter.numel() for parameter in block.parameters())


def _nothing_fits(strategy: MeshStrategy, trials: _Trials, tried: Sequence[Trial], budget: int) -> str:
    def took(trial: Trial) -> str:
        size = "ran out of memory" if trial.peak is None else f"took {gib(trial.peak)}"
        return f"{trials.setting(trial.plan).setting} {size}"

    assert strategy.memory is not None
    return (
        f"memory={strategy.memory.given!r} allows {gib(budget)}, and a step of the largest micro-batch "
        f"({trials.tokens:,} tokens) does not fit: {'; '.join(map(took, tried))}. Make rows shorter (data.seq_len) or "
        "micro-batches smaller (data.micro_batch_size), hold the frozen base in 4 bits (lora.quantize=nf4), split rows "
        "or weights over more GPUs (cp, dp_shard), or give more memory."
    )
