"""What a replica group does before the others know that it is back, and how it is handed their state."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch._dynamo.utils import counters

from automodel_trainer.strategies.fault_tolerant._torchft import Peers
from automodel_trainer.strategies.fault_tolerant.rehearsal import rehearse
from automodel_trainer.strategies.fault_tolerant.returned import Clock, Returned
from automodel_trainer.strategies.fault_tolerant.state import Sent, Shards, take_over
from tests.beside import use
from tests.callbacks.runs import train
from tests.counted_memory import CountedMemory
from tests.processes import Job
from tests.strategies.test_budget import PLENTY, both

CPU = torch.device("cpu")


# --- the state --------------------------------------------------------------------------------------------------------


def model(seed: int) -> nn.Module:
    """Parameters of several dtypes, one that is not contiguous, one that is frozen, a scalar, and buffers."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2).bfloat16())
    made.register_parameter("turned", nn.Parameter(torch.randn(3, 5).t()))
    made.register_parameter("scalar", nn.Parameter(torch.randn(())))
    made.register_parameter("empty", nn.Parameter(torch.randn(0, 3)))
    made.register_parameter("frozen", nn.Parameter(torch.randn(2), requires_grad=False))
    made.register_buffer("marks", torch.rand(4) > 0.5)
    return made


def stepped(made: nn.Module, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_arrives_as_it_is(steps: int) -> None:
    """In the memory that is there; what is sent is not copied, and what is pickled is."""
    theirs, mine = model(1), model(2)
    given, taking = stepped(theirs, 3), stepped(mine, steps)
    shards = Shards(theirs, [given], CPU)
    assert {tensor.untyped_storage().data_ptr() for tensor in shards.apart} >= {
        tensor.untyped_storage().data_ptr() for tensor in (theirs.turned, theirs.marks, theirs[0].weight)
    }
    assert isinstance(shards.message["parameters"][0], Sent | Tensor)
    places = [parameter.data_ptr() for parameter in mine.parameters()]
    held = {id(value) for state in taking.state.values() for value in state.values() if value.ndim}
    versions = [parameter._version for parameter in mine.parameters() if parameter.requires_grad]
    sent = iter(shards.apart)
    take_over(shards.message, mine, [taking], lambda tensor: tensor.copy_(next(sent)))
    assert next(sent, None) is None
    for name, value in theirs.state_dict().items():
        if name != "frozen":
            assert torch.equal(mine.state_dict()[name], value), name
    assert not torch.equal(mine.frozen, theirs.frozen)
    assert places == [parameter.data_ptr() for parameter in mine.parameters()]
    after = [parameter._version for parameter in mine.parameters() if parameter.requires_grad]
    assert all(new > old for new, old in zip(after, versions))
    right, found = given.state_dict(), taking.state_dict()
    assert right["state"].keys() == found["state"].keys()
    for number, values in right["state"].items():
        assert all(torch.equal(found["state"][number][name], value) for name, value in values.items())
    now = {id(value) for state in taking.state.values() for value in state.values() if value.ndim}
    assert not held or now == held
    stepped_on = [next(iter(optimizer.state.values()))["step"].add_(1) for optimizer in (given, taking)]
    assert stepped_on == [4, 4], "nothing is shared"


def test_another_model_is_refused() -> None:
    theirs, mine = nn.Linear(3, 2), nn.Linear(2, 3)
    shards = Shards(theirs, [], CPU)
    with pytest.raises(ValueError, match=r"float32 \[2, 3\] where this one has torch.float32 \[3, 2\]"):
        take_over(shards.message, mine, [], lambda tensor: None)
    with pytest.raises(ValueError, match="has 2 tensors where this one has 1 tensors"):
        take_over(shards.message, nn.Linear(3, 2, bias=False), [], lambda tensor: None)


# --- the rehearsal ----------------------------------------------------------------------------------------------------


class Rehearses(Callback):
    """Before the first step, and again when there are gradients' traces and optimizer states."""

    def __init__(self) -> None:
        self.forwards = 0

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step in (0, 3):
            module.model.register_forward_hook(self._count)
            before = self.forwards
            rehearse(trainer.strategy, trainer)
            assert self.forwards > before

    def _count(self, *_: Any) -> None:
        self.forwards += 1


def test_a_rehearsal_leaves_no_trace(tmp_path: Path) -> None:
    """Not in weights, optimizer states, losses with dropout, or random numbers."""
    runs = [train(tmp_path / str(len(more)), more, strategy="fsdp2", max_epochs=1) for more in ([], [Rehearses()])]
    assert runs[0]["journal"] == runs[1]["journal"]
    for name, value in runs[0]["weights"].items():
        assert torch.equal(runs[1]["weights"][name], value), name
    states = [run["trainer"].optimizers[0].state_dict() for run in runs]
    assert str(states[0]) == str(states[1])


class CountsGraphs(Callback):
    """Prints how many graphs are compiled before this group meets the others, and how many when a step ends."""

    def on_fit_start(self, trainer: Any, *args: Any) -> None:
        connect = trainer.strategy._connect

        def connects() -> Peers:
            print(f"rehearsed {compiled()} graphs")
            return connect()

        trainer.strategy._connect = connects

    def on_train_batch_end(self, *args: Any) -> None:
        print(f"in all {compiled()} graphs")


def compiled() -> int:
    return counters["stats"]["unique_graphs"]


class Tries(Callback):
    """Prints that it tries steps, and when the group met the others."""

    def before_peers(self, trainer: Any, module: Any, loader: Any) -> None:
        print(f"tries {len(loader.largest_steps())} step, {'met' if trainer.strategy._peers else 'alone'}")


def compiles(root: str, address: str) -> None:
    use("torchft")
    strategy = f"hsdp:fault_tolerant=true,lighthouse={address},compile=true,compile_backend=aot_eager"
    train(Path(root), [CountsGraphs(), Tries()], strategy=strategy, max_steps=2, max_epochs=-1, limit_val_batches=0)


def test_nothing_is_compiled_while_others_wait(tmp_path: Path, lighthouse: str) -> None:
    job = Job(tmp_path / "log", compiles, str(tmp_path), lighthouse)
    assert job.wait() == [0], job.log()
    lines = [line for line in job.log().splitlines() if line.endswith("graphs")]
    rehearsed, *later = [int(line.split()[-2]) for line in lines]
    assert rehearsed > 0
    assert later == [rehearsed, rehearsed]
    assert "tries 1 step, alone" in job.log()


def budgets(root: str, address: str) -> None:
    use("torchft")
    group = f"hsdp:fault_tolerant=true,lighthouse={address}"
    setting, different = both(group, 2_100_000, CountedMemory(PLENTY), 1, root)
    assert setting.startswith("activation_checkpointing=full")
    assert not different


def test_a_budget_is_tried_in_the_rehearsal(tmp_path: Path, lighthouse: str) -> None:
    """Once; the run is that with the choice given."""
    job = Job(tmp_path / "log", budgets, str(tmp_path), lighthouse)
    assert job.wait() == [0], job.log()
    assert sum(line.startswith("memory=") for line in job.log().splitlines()) == 1


# --- groups that are lost meanwhile -----------------------------------------------------------------------------------


class DiesInTheMiddle(Callback):
    """This group is killed when it has sent a part of its state."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        time.sleep(0.1)
        peers = trainer.strategy._peers
        send = peers.send

        def dies(tensors: list[Tensor]) -> None:
            send(tensors[:3])
            os.kill(os.getpid(), signal.SIGKILL)

        if trainer.global_step > 1:
            print("alone", flush=True)
            peers.send = dies


def gives(root: str, address: str) -> None:
    use("torchft")
    strategy = f"hsdp:fault_tolerant=true,lighthouse={address},replica_timeout=20"
    train(Path(root), [DiesInTheMiddle()], strategy=strategy, max_epochs=1000)


def takes(root: str, address: str) -> None:
    use("torchft")
    strategy = f"hsdp:fault_tolerant=true,lighthouse={address},replica_timeout=20"
    with pytest.raises(RuntimeError, match="got the state of another only in part, and no group is left that has the"):
        train(Path(root), strategy=strategy, max_epochs=1)


def test_a_group_that_has_half_a_state_and_nobody_left_must_not_train(tmp_path: Path, lighthouse: str) -> None:
    first = Job(tmp_path / "0", gives, str(tmp_path), lighthouse)
    first.until("alone", timeout=60)
    second = Job(tmp_path / "1", takes, str(tmp_path), lighthouse)
    assert first.wait() == [-signal.SIGKILL], first.log() + second.log()
    assert second.wait() == [0], second.log()


# --- what it cost -----------------------------------------------------------------------------------------------------


def test_a_return_is_told_in_a_line() -> None:
    late = Returned(True, 12.3, 0.5, 2.0, 13 * 10**9, 0.75)
    assert str(late) == (
        "0.50 s to meet, 2.00 s for 13.00 GB of state (6.50 GB/s), 0.75 s for the step; rehearsed before that for "
        "12.30 s"
    )
    there = Returned(False, None, 0.5, 2.0, 0, 0.75)
    assert str(there) == "0.50 s to meet, 2.00 s for its state, 0.75 s for the step"
    assert there.metrics == {"return_meeting_seconds": 0.5, "return_transfer_seconds": 2.0, "return_step_seconds": 0.75}
    assert late.metrics == {**there.metrics, "return_rehearsal_seconds": 12.3}
    clock = Clock(rehearsal=3.0)
    assert clock.returned(late=False).rehearsal is None
    assert clock.returned(late=True).rehearsal == 3.0
