"""FaultTolerantStrategy: HSDP whose replicas are processes of their own, and may drop out and come back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from automodel_trainer._lightning import attached_trainer, count_step
from automodel_trainer.checkpoint.folder import neighbours
from automodel_trainer.checkpoint.rng import set_rng_state
from automodel_trainer.checkpoint.state import RNG_KEY
from automodel_trainer.data.global_batch import GlobalBatch
from automodel_trainer.distributed.phase import during_phase, enter_phase
from automodel_trainer.strategies.base.objective import MicroBatch, Objective, count_all
from automodel_trainer.strategies.data_parallel.fsdp2 import FSDP2Strategy
from automodel_trainer.strategies.expert.plan import find_experts
from automodel_trainer.strategies.fault_tolerant._torchft import (
    Peers,
    host_towards,
    lighthouse_address,
    require_lighthouse,
    require_torchft,
)
from automodel_trainer.strategies.fault_tolerant.gradients import sum_gradients
from automodel_trainer.strategies.fault_tolerant.rehearsal import rehearse
from automodel_trainer.strategies.fault_tolerant.returned import Clock, Returned
from automodel_trainer.strategies.fault_tolerant.run_state import (
    TAKEN_OVER,
    as_checkpoint,
    is_over,
    state_before_step,
    without_tensors,
)
from automodel_trainer.strategies.fault_tolerant.state import Shards, take_over, trained

_AGAIN = 0.5  # seconds between two looks for more groups


class _Met(NamedTuple):
    """The groups that take part in a step: this one's place among them, and their number."""

    place: int
    groups: int


class FaultTolerantStrategy(FSDP2Strategy):
    """FSDP2 within a replica group; gradients are summed over the groups that live, by torchft.

    Each group is a job of its own (its own torchrun). The groups meet before every step at a lighthouse. The rows of
    the global batch are dealt to the groups that are there, so a step with fewer groups has the same rows and takes
    longer. If a group is lost in a step, the others repeat it. A group that comes back is given weights, optimizer
    state and place in the data by another one (docs/fault_tolerance.md).

    Args:
        dp_replicate: the number of groups that the global batch is made for. There may be fewer at any time.
        dp_shard: ranks of each group; -1 takes all of them.
        min_replicas: with fewer groups than this the run waits.
        lighthouse: the lighthouse's address, `http://HOST:PORT`; None: `TORCHFT_LIGHTHOUSE`.
        replica_timeout: seconds that a step waits for a group that is slow, or whose machine is silent.
        kwargs: see `FSDP2Strategy`; `tp`, `cp` and `ep` must be 1.

    Raises:
        ValueError: a size does not fit, or the layout splits more than parameters.

    Source: torchft, github.com/pytorch/torchft.
    """

    def __init__(
        self,
        dp_replicate: int = 2,
        dp_shard: int = -1,
        *,
        min_replicas: int = 1,
        lighthouse: str | None = None,
        replica_timeout: float = 60.0,
        **kwargs: Any,
    ) -> None:
        _check(dp_replicate, min_replicas, replica_timeout, kwargs)
        super().__init__(dp_shard, **kwargs)
        self.replicas, self.min_replicas = dp_replicate, min_replicas
        self.lighthouse, self.replica_timeout = lighthouse, replica_timeout
        self._peers: Peers | None = None
        self._store: dist.TCPStore | None = None
        self._met: _Met | None = None  # for the step that begins
        self._wrote: bool = False
        self._why = ""  # the last step or meeting was not whole
        self._message: dict[str, Any] | None = None  # of another group, whose tensors follow
        self._given: dict[str, Any] | None = None  # by another group, as a whole, and not used yet
        self._torn = False  # a state came only in part, and this group has neither its own nor that
        self._resumed: dict[str, Any] | None = None  # what this group began with, until its first step
        self._clock = Clock()
        self._late = False  # this group comes back in the step that begins
        self.returned: Returned | None = None  # the last return of a group

    # --- before the first step ----------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """See `MeshStrategy.setup_environment`.

        Raises:
            ValueError: torchft is not installed, no lighthouse answers, or there is no Trainer.
        """
        trainer = attached_trainer(self.lightning_module)
        if trainer is None:
            raise ValueError(
                "fault_tolerant=true is for a Trainer: it gives late groups their place in the loop. In a loop of your "
                "own use FSDP2Strategy(dp_replicate=…)."
            )
        if trainer.state.fn == TrainerFn.FITTING:
            require_torchft()
            require_lighthouse(lighthouse_address(self.lighthouse))
        super().setup_environment()

    def parallelize(self, model: nn.Module) -> nn.Module:
        """See `FSDP2Strategy.parallelize`.

        Raises:
            ValueError: the model has experts, whose balance counts tokens of all groups.
        """
        if find_experts(model):
            raise ValueError(
                "fault_tolerant=true trains dense models: the balance of experts counts tokens over all groups, which "
                "it does not do yet. Use strategy='hsdp' or 'fsdp2'."
            )
        return super().parallelize(model)

    def lay_out_user_module(self, module: Any) -> None:
        """Refuse a user's own module.

        Raises:
            ValueError: it runs its own steps, so none of them can be repeated.
        """
        raise ValueError(
            f"fault_tolerant=true repeats a step that was lost, and {type(module).__name__} runs its steps itself. "
            "Give fit a model, CausalLMModule or another objective; or use strategy='hsdp'."
        )

    def state_of_peers(self, restored: Mapping[str, Any]) -> dict[str, Any] | None:
        """Meet the other groups for the first time. Collective.

        Args:
            restored: the checkpoint that this group has just restored; empty for none.

        Returns:
            what a run resumes from, if another group is further; None otherwise.
        """
        trainer = attached_trainer(self.lightning_module)
        assert trainer is not None
        if is_over(trainer):  # nobody else may come any more
            return None
        neighbours.present = True
        self._clock.restart()
        rehearse(self, trainer)
        self._clock.rehearsal = self._clock.seconds()
        self._peers = self._connect()  # from here on the others wait for this group
        self._peers.begin_at(trainer.global_step)
        self._resumed = without_tensors(dict(restored))
        self._wrote = self._meet().place == 0
        given, self._given = self._given, None
        behind = self._peers.step - trainer.global_step
        if given is None or behind <= 0:
            return None
        self._resumed, self._late = given["run"], True
        rank_zero_info(f"Another replica group is at step {self._peers.step}: this one goes on from there.")
        return as_checkpoint(given["run"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """See `SavingStrategy`. The state of another group is here already."""
        if checkpoint.get(TAKEN_OVER):
            set_rng_state(checkpoint[RNG_KEY])
            return
        super().load_optimizer_state_dict(checkpoint)

    def _connect(self) -> Peers:
        address = lighthouse_address(self.lighthouse)
        place: tuple[str, int] | None = None
        if self.global_rank == 0:
            self._store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
            place = host_towards(address), self._store.port
        return Peers(
            lighthouse=address,
            rank=self.global_rank,
            ranks=self.world_size,
            store=self.broadcast(place),
            device=self._sums_on,
            timeout=self.replica_timeout,
            quorum_timeout=self.timeout.total_seconds(),
            load=self._note_message,
        )

    @property
    def _sums_on(self) -> torch.device:
        """Where tensors lie that the groups exchange."""
        return torch.device("cpu") if self.cpu_offload else self.root_device

    # --- what late groups are given -----------------------------------------------------------------------------------

    def _state_for_others(self) -> Shards:
        """The state before the step that begins. Collective over the group."""
        trainer = attached_trainer(self.lightning_module)
        assert trainer is not None
        shards = Shards(self.trained_module, self.optimizers, self._sums_on)
        shards.message["run"] = self._resumed if self._resumed is not None else state_before_step(trainer)
        return shards

    def _note_message(self, message: dict[str, Any]) -> None:
        self._message = message

    def _hand_over(self, shards: Shards | None) -> None:
        """Send tensors to the late groups that have this group's message, or receive those of the message that came."""
        peers = self._peers
        assert peers is not None
        self._clock.meeting, self._clock.sent = self._clock.seconds(), 0

        def receive(tensor: Tensor) -> None:
            fill(tensor)
            self._clock.sent += tensor.nbytes

        with during_phase("state"):
            if shards is not None and peers.gives:
                peers.send(shards.apart)
                self._clock.sent = sum(tensor.nbytes for tensor in shards.apart)
            if self._message is not None:
                with peers.receiving() as fill:
                    take_over(self._message, self.trained_module, self.optimizers, receive)
        self._clock.transfer = self._clock.seconds()

    # --- a step -------------------------------------------------------------------------------------------------------

    def take_gradients(self, objective: Objective, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor] | None:
        """See `MeshStrategy.take_gradients`. The step is repeated until it is whole.

        Raises:
            ValueError: the data cannot be dealt anew in every step, or too few groups came.
            RuntimeError: this group fell behind the others by several steps.
        """
        if not isinstance(micro_batches, GlobalBatch):
            raise ValueError(
                "fault_tolerant=true deals the rows of every step to the groups that are there, so it needs data that "
                "are given as a path, rows or a data set, or a data module of this project that does not stream. A "
                "loader of your own has dealt them already: use strategy='hsdp' with it."
            )
        end = time.monotonic() + self.timeout.total_seconds()
        while True:
            if not self._caught_up():
                return None
            assert self._met is not None
            met, self._met = self._met, None
            taken = self._attempt(objective, micro_batches, met)
            if taken is not None:
                if self._late or (self._resumed is None and met.groups > self.groups_met):
                    self._tell_return()
                self._wrote, self._resumed, self.groups_met = met.place == 0, None, met.groups
                return taken
            if self._any(time.monotonic() > end)[0]:
                raise ValueError(self._apart(met.groups, self._why))
            rank_zero_info(
                "A replica group was lost in this step, which is repeated with the groups that are there"
                f"{self._why and f' ({self._why})'}."
            )
            for parameter in trained(objective.model):
                parameter.grad = None

    def _tell_return(self) -> None:
        """Say and log what the return cost that this step ends."""
        trainer = attached_trainer(self.lightning_module)
        assert trainer is not None
        self.returned, self._late = self._clock.returned(self._late), False
        what = "This replica group is back" if self.returned.late else "A replica group came back"
        rank_zero_info(f"{what} in step {trainer.global_step + 1}: {self.returned}.")
        for logger in trainer.loggers:
            logger.log_metrics(self.returned.metrics, step=trainer.global_step)

    def _caught_up(self) -> bool:
        """Meet the others; False if they have committed this step already, so that this group has the next state."""
        trainer = attached_trainer(self.lightning_module)
        assert trainer is not None
        assert self._peers is not None
        if self._met is None:
            self._meet()
        behind = self._peers.step - trainer.global_step
        given, self._given = self._given, None
        if behind == 0:
            return True
        if behind != 1 or given is None:
            raise RuntimeError(
                f"This replica group fell {behind} steps behind the others: it was stopped or cut off from the "
                "lighthouse, or it came to a step later than --join_timeout_ms of the lighthouse allows (after a slow "
                "save?). Start it again (torchrun --max-restarts does): it then goes on where the others are."
            )
        for config, state in zip(self.lr_scheduler_configs, given["run"]["lr_schedulers"], strict=True):
            config.scheduler.load_state_dict(state)
        for optimizer in self._lightning_optimizers:
            count_step(optimizer)
        self._wrote = False
        return False

    def _meet(self) -> _Met:
        """Wait for enough groups to begin a step.

        Raises:
            ValueError: they do not come.
        """
        peers, end, told = self._peers, time.monotonic() + self.timeout.total_seconds(), False
        assert peers is not None
        groups, self._why = 0, ""
        self._clock.restart()
        with during_phase("quorum"):
            while (left := end - time.monotonic()) > 0:
                try:
                    place, groups = peers.meet(left)
                except TimeoutError as error:
                    require_lighthouse(lighthouse_address(self.lighthouse), patience=0)
                    raise ValueError(self._nobody(groups, str(error))) from error
                if self._is_whole(place, groups):
                    if groups >= self.min_replicas:
                        self._met = _Met(place, groups)
                        return self._met
                    if not told:
                        told = True
                        rank_zero_warn(
                            f"Waiting for min_replicas={self.min_replicas} replica groups; there are {groups}."
                        )
                time.sleep(_AGAIN)
        if groups >= self.min_replicas:
            raise ValueError(self._apart(groups, self._why))
        raise ValueError(self._nobody(groups, "none came"))

    def _is_whole(self, place: int, groups: int) -> bool:
        """Give late groups the state, and look whether all who met are reached; if not, the groups must meet again.

        Raises:
            RuntimeError: this group was given a state in part, and nobody is left who has the whole.
        """
        peers = self._peers
        assert peers is not None
        asked, given, failed = self._any(peers.asked, self._message is not None, peers.failed)
        shards = self._state_for_others() if asked else None
        if shards is not None and peers.asked:
            peers.give(shards.message)
        if not failed and peers.others_changed:
            peers.watch(place, groups)
            (failed,) = self._any(peers.failed)
        if not failed and (asked or given):
            self._torn |= given
            self._hand_over(shards)
            (failed,) = self._any(peers.failed)
            self._torn &= failed
        message, self._message = self._message, None
        if failed:
            self._why = peers.why
            peers.commit()  # which tells the lighthouse that this group needs another quorum
            peers.fall_back()  # some ranks may have got all, and others not
        elif self._torn:
            raise RuntimeError(
                "This replica group got the state of another only in part, and no group is left that has the whole. "
                "Start it again (torchrun --max-restarts does): it then goes on from the last checkpoint."
            )
        elif message is not None:
            self._given = message
        return not failed

    def _nobody(self, groups: int, why: str) -> str:
        return (
            f"The step cannot begin: min_replicas={self.min_replicas} replica groups are needed and {groups} met "
            f"within {self.timeout.total_seconds():g} s at {lighthouse_address(self.lighthouse)} ({why}). Start more "
            "groups, lower min_replicas, or lower --min_replicas of the lighthouse, which must not be higher."
        )

    def _apart(self, groups: int, why: str) -> str:
        return (
            f"{groups} replica groups meet at {lighthouse_address(self.lighthouse)}, but for "
            f"{self.timeout.total_seconds():g} s they could not sum over their ranks ({why or 'see the other ranks'}). "
            "Their machines must reach each other by name, on any port."
        )

    def _attempt(self, objective: Objective, batch: GlobalBatch, met: _Met) -> tuple[Tensor, Tensor] | None:
        """Gradients of the global batch by the groups that met; None if one of them was lost."""
        assert self._peers is not None
        batch.deal(met.place * self.dp_size + self.dp_rank, met.groups * self.dp_size)
        batch[:] = [self.batch_to_device(micro_batch) for micro_batch in batch]
        tokens = self.sum_over_rows(count_all(objective, batch))
        self._add_up(tokens)
        loss = None
        if not self._any(self._peers.failed)[0]:
            loss = self.sum_over_tokens(self.forward_backward(objective, batch, tokens))
            enter_phase("sum over replica groups")
            sum_gradients(trained(objective.model), self._add_up)
            self._add_up(loss)
        whole = self._peers.commit()
        if not whole or loss is None:
            self._why = self._peers.why
            return None
        return loss / self.dp_size, tokens  # as in `forward_backward`, the sum over ranks is that of the global batch

    def _add_up(self, tensor: Tensor) -> None:
        assert self._peers is not None
        moved = tensor.to(torch.device("cpu") if self.cpu_offload else tensor.device)
        self._peers.add_up(moved)
        if moved is not tensor:
            tensor.copy_(moved)

    def _any(self, *facts: bool) -> list[bool]:
        """Of each fact whether it is true on any rank of this group: its ranks must not part ways."""
        found = torch.tensor(facts, dtype=torch.int64, device=self.root_device)
        return [bool(number) for number in self.sum_over_rows(found).tolist()]

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """See `MeshStrategy.batch_to_device`. A global batch is dealt first."""
        return batch if isinstance(batch, GlobalBatch) else super().batch_to_device(batch, device, dataloader_idx)

    # --- around the steps ---------------------------------------------------------------------------------------------

    @property
    def writes_checkpoints(self) -> bool:
        """See `SavingStrategy.writes_checkpoints`: the first of the groups that ran the last step."""
        return self._wrote

    def teardown(self) -> None:
        """See `MeshProcesses.teardown`. The other groups are told by silence."""
        neighbours.present = False
        if self._peers is not None:
            self._peers.leave()
        self._peers = self._store = self._met = self._message = self._given = self._resumed = None
        super().teardown()


def _check(dp_replicate: int, min_replicas: int, replica_timeout: float, options: Mapping[str, Any]) -> None:
    if dp_replicate < 2:
        raise ValueError(
            f"fault_tolerant=true with dp_replicate={dp_replicate}: one group has no other to go on with. Allowed: 2 "
            "or more; or leave fault_tolerant out."
        )
    if not 1 <= min_replicas <= dp_replicate:
        raise ValueError(
            f"min_replicas={min_replicas} does not fit dp_replicate={dp_replicate}: allowed is 1 to {dp_replicate}, "
            "the groups that are started."
        )
    if replica_timeout <= 0:
        raise ValueError(f"replica_timeout={replica_timeout} must be more than 0 seconds.")
    split = [f"{name}={options[name]}" for name in ("tp", "cp", "ep") if options.get(name, 1) != 1]
    if split:
        raise ValueError(
            f"fault_tolerant=true works within groups that shard parameters (dp_shard), and not with {', '.join(split)}"
            ". Leave that out, or leave out fault_tolerant: checkpoints then bring a lost run back."
        )
