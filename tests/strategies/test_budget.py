"""A memory budget: the fastest setting that fits, agreed on by all ranks, and a run as if no step had been tried.

On a CPU, tensors are counted (tests/counted_memory.py); there are 1 MiB devices that run out.
"""

from __future__ import annotations

import importlib
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from automodel_trainer import CausalLMModule, LoRAConfig, MockDataModule, Trainer
from automodel_trainer.callbacks import Ledger
from automodel_trainer.callbacks.ledger_text import ledger_rows
from automodel_trainer.callbacks.memory_budget import MemoryBudget
from automodel_trainer.distributed._dtensor import local_tensor
from automodel_trainer.strategies import DDPStrategy, FSDP2Strategy, Parallel3DStrategy
from automodel_trainer.strategies.base import together, trials
from automodel_trainer.strategies.base.block_modes import modes_of_blocks, text_of
from automodel_trainer.strategies.base.budget import Budget, Chosen
from automodel_trainer.strategies.base.search import Plan, Trial, search
from automodel_trainer.strategies.base.state_bytes import missing_state_bytes
from tests.beside import use
from tests.counted_memory import CountedMemory
from tests.harness import NextToken, make_strategy, random_rows
from tests.matrix import more
from tests.pool import RankPool
from tests.processes import Job
from tests.tiny import tiny_model

PLENTY = 2**40
LADDER = (None, "selective", "full", "offload")


# --- the settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "modes"),
    [
        (None, [None] * 4),
        ("full", ["full"] * 4),
        ("full:3", ["full"] * 3 + [None]),
        ("offload:1+selective", ["offload"] + ["selective"] * 3),
        ("full:1+none:1+selective:1", ["full", None, "selective", None]),
    ],
)
def test_modes_as_text(text: str | None, modes: list[Any]) -> None:
    assert modes_of_blocks(text, 4) == modes
    assert text_of(modes) == text


@pytest.mark.parametrize("text", ["most", "full:", "full:x", "full+", "full:-1"])
def test_unknown_modes(text: str) -> None:
    for strategy in (DDPStrategy, FSDP2Strategy):
        with pytest.raises(ValueError, match="Allowed: full, selective, offload"):
            strategy(activation_checkpointing=text)


def test_budgets() -> None:
    def given(value: Any) -> Budget:
        found = Budget.of(value, None, False)
        assert found is not None
        return found

    sizes = [given(value).bytes_of(100 * 2**30) / 2**30 for value in ("80%", "20GiB", "20", 0.5, 100, "12.5 GiB")]
    assert sizes == [80, 20, 20, 0.5, 100, 12.5]
    for wrong in ("101%", "0%", 0, -1, "much", True, "20MB", ""):
        with pytest.raises(ValueError, match="Allowed: a share of the device"):
            given(wrong)
    with pytest.raises(ValueError, match=r"memory=101 is more than the 100.0 GiB"):
        given(101).bytes_of(100 * 2**30)
    with pytest.raises(ValueError, match="tiled_mlp='auto' is given too"):
        FSDP2Strategy(memory="80%", tiled_mlp="auto")
    with pytest.raises(ValueError, match="activation_checkpointing='full' is given too"):
        DDPStrategy(memory="80%", activation_checkpointing="full")


# --- the search -------------------------------------------------------------------------------------------------------


class Device:
    """Reckons what a plan takes: blocks behind have given back what they keep when one in front is computed again."""

    def __init__(self, sizes: list[int], total: int) -> None:
        self.sizes, self.total = sizes, total
        self.share = {None: 1.0, "selective": 0.8, "full": 0.1, "offload": 0.0}

    def kept(self, modes: Any) -> list[float]:
        return [size * self.share[mode] for size, mode in zip(self.sizes, modes)]

    def peak(self, plan: Plan) -> float:
        kept = self.kept(plan.modes)
        work = [
            size * (1.5 if plan.tiled else 3.0 if mode in ("full", "offload") else 1.0)
            for size, mode in zip(self.sizes, plan.modes)
        ]
        return 1000 + max(sum(kept[:index]) + work[index] for index in range(len(kept)))

    def measure(self, plan: Plan) -> Trial:
        kept = {(size, mode): int(size * self.share[mode]) for size, mode in zip(self.sizes, plan.modes)}
        peak = self.peak(plan)
        if peak > self.total:
            kept.popitem()  # of the last block nothing is known
        return Trial(plan, None if peak > self.total else int(peak), kept)


def ladder_plans(count: int, ladder: Any) -> list[tuple[Any, ...]]:
    """The modes of every plan, the fastest first."""
    pairs = [(slow, fast, first) for fast, slow in pairwise(ladder) for first in range(count)]
    return [(slow,) * first + (fast,) * (count - first) for slow, fast, first in pairs] + [(ladder[-1],) * count]


def fastest(device: Device, budget: float, ladder: Any, tiled: bool) -> int | None:
    """The fastest plan that fits, as all slower ones do: every one is looked at. None: the slowest does not.

    A faster one may fit that the slower ones beside it do not: the last of the blocks that are computed again may lie
    where nothing is kept behind it any more. The search need not find it.
    """
    plans = ladder_plans(len(device.sizes), ladder)
    bad = [step for step, modes in enumerate(plans) if device.peak(Plan(modes, tiled)) > budget]
    first = max(bad, default=-1) + 1
    return first if first < len(plans) else None


@pytest.mark.parametrize("sizes", [[100] * 32, [40] * 8 + [100] * 12, [100, 7] * 9, [100] * 2])
@pytest.mark.parametrize("ladder", [LADDER, (None, "full", "offload")])
def test_the_fastest_plan_that_fits(sizes: list[int], ladder: Any) -> None:
    device = Device(sizes, total=1000 + sum(sizes) * 2)
    whole = device.peak(Plan((None,) * len(sizes)))
    for budget in range(1100, int(whole) + 50, 37):
        found, trials = search(sizes, ladder, True, budget, device.measure)
        if found is None:
            assert device.peak(Plan(("offload",) * len(sizes), True)) > budget
            continue
        assert found.peak is not None
        assert device.peak(found.plan) <= found.peak + 1 <= budget + 1
        assert found.plan.tiled == (fastest(device, budget, ladder, False) is None)
        # Nothing faster is known to fit: what its blocks keep more does not.
        plans = ladder_plans(len(sizes), ("full", "offload") if found.plan.tiled else ladder)
        kept = sum(device.kept(found.plan.modes))
        for modes in plans[: plans.index(found.plan.modes)]:
            assert found.peak + sum(device.kept(modes)) - kept > budget - len(sizes)
        assert len(trials) <= 6 * (1 + found.plan.tiled)


def test_a_device_that_runs_out() -> None:
    """What does not fit on the device is not taken, whatever the budget says; a guess halfway follows."""
    sizes = [100] * 16
    device = Device(sizes, total=1900)
    found, trials = search(sizes, (None, "full", "offload"), True, 5000, device.measure)
    assert found is not None
    assert device.peak(found.plan) <= 1900
    assert any(trial.peak is None for trial in trials)
    smaller = Device(sizes, total=1100)
    assert search(sizes, LADDER, True, 5000, smaller.measure)[0] is None


def test_state_that_does_not_exist_yet() -> None:
    """As large as what the optimizer makes in its first step, and nothing after it."""

    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("not with fake tensors")

    parameters = [nn.Parameter(torch.ones(64, 32)), nn.Parameter(torch.ones(7, dtype=torch.bfloat16))]
    cpu = torch.device("cpu")
    for optimizer in (
        torch.optim.AdamW(parameters, fused=True),
        torch.optim.AdamW(parameters, foreach=True),
        torch.optim.SGD(parameters, lr=0.1),
        torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        torch.optim.Adafactor(parameters),
    ):
        reckoned = missing_state_bytes([optimizer], cpu)
        assert not optimizer.state
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        made = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
        assert reckoned == sum(tensor.nbytes for tensor in made)
        assert made == [] or missing_state_bytes([optimizer], cpu) == 0
    assert missing_state_bytes([Odd(parameters, lr=0.1)], cpu) == 2 * sum(p.nbytes for p in parameters)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_state_in_few_bits_that_does_not_exist_yet(name: str) -> None:
    use("torchao")
    optim = importlib.import_module("torchao.optim")
    parameters = [nn.Parameter(torch.ones(64, 96)), nn.Parameter(torch.ones(7))]
    optimizer = getattr(optim, name)(parameters)
    reckoned = missing_state_bytes([optimizer], torch.device("cpu"))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with torch.compiler.set_stance("force_eager"):  # it compiles its step, for half a minute
        optimizer.step()
    assert reckoned == sum(
        getattr(value, inner).nbytes if inner else value.nbytes
        for state in optimizer.state.values()
        for value in (state["exp_avg"], state["exp_avg_sq"])
        for inner in (value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else [""])
    )
    assert reckoned < sum(parameter.nbytes for parameter in parameters)


# --- runs -------------------------------------------------------------------------------------------------------------


class Numbers(Callback):
    """Everything that a tried step could have changed, before and after each step, as bytes: those are not counted."""

    def __init__(self) -> None:
        self.found: list[list[bytes]] = []

    def _note(self, *tensors: Tensor) -> None:
        self.found.append([tensor.detach().numpy().tobytes() for tensor in tensors])

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        first = [part["input_ids"] for part in batch[:1]]  # a global batch of replica groups is not dealt yet
        self._note(*first, torch.rand(2), *module.buffers())

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        weights = [local_tensor(parameter) for parameter in module.parameters() if parameter.requires_grad]
        self._note(trainer.callback_metrics["train_loss"], *weights)


def run(spec: str, devices: int, folder: str, device: Any = None, **options: Any) -> tuple[Any, Trainer]:
    """Three steps with dropout; the budget counts on `device`."""
    torch.manual_seed(1)
    overrides = {"num_hidden_layers": 6, "attention_dropout": 0.2, **options.pop("overrides", {})}
    model = options.pop("model", None) or tiny_model(options.pop("family", "llama"), **overrides)
    numbers = Numbers()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=spec,
        max_steps=3,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=[numbers, *([MemoryBudget(device)] if device is not None else [])],
    )
    sizes = {"micro_batch_size": 2, "global_batch_size": options.pop("rows", 4 * devices)}
    data = MockDataModule(vocab_size=200, seq_len=64, num_samples=64, **sizes)
    module = CausalLMModule(model, lr=1e-3, **options)
    if device is None:
        trainer.fit(module, data)
    else:
        with device:
            trainer.fit(module, data)
    return numbers.found, trainer


def both(
    spec: str, budget: int, device: CountedMemory, devices: int, folder: str, **options: Any
) -> tuple[str, list[int]]:
    """A run with a budget (bytes), and one with what it chose given explicitly. They must be equal, every bit of them.

    Returns:
        the choice, and the numbers where the runs differ.
    """
    separator = "," if ":" in spec else ":"
    asked = f"{spec}{separator}memory={budget / 2**30:.9f}"
    budgeted, trainer = run(asked, devices, folder, device, **options)
    chosen: Chosen = trainer.strategy.chosen  # type: ignore[attr-defined]
    assert chosen.peak <= chosen.budget <= budget
    explicit, _ = run(f"{spec}{separator}{chosen.setting}", devices, folder, **options)
    assert len(budgeted) == len(explicit) == 6
    return chosen.setting, [i for i, (a, b) in enumerate(zip(budgeted, explicit)) if a != b]


@pytest.mark.parametrize(
    ("spec", "budget", "limit", "wanted", "options"),
    [
        ("fsdp2", 8_000_000, PLENTY, "activation_checkpointing=null", {"rows": 2}),
        ("fsdp2", 2_100_000, PLENTY, "activation_checkpointing=full", {}),
        ("fsdp2", 1_400_000, PLENTY, "activation_checkpointing=offload", {"lora": LoRAConfig(rank=4, dropout=0.1)}),
        ("ddp", 8_000_000, 2_500_000, "activation_checkpointing=full:", {}),  # less is free than the budget allows
        more("ddp", 3_200_000, PLENTY, "activation_checkpointing=selective:", {}),
    ],
)
def test_one_device(tmp_path: Path, spec: str, budget: int, limit: int, wanted: str, options: Any) -> None:
    setting, different = both(spec, budget, CountedMemory(limit), 1, str(tmp_path), **options)
    assert setting.startswith(wanted)
    assert not different


class RunsOut(CountedMemory):
    """Runs out once, when the fourth block of the first trial begins: on all ranks at one place."""

    reads = 0

    def allocated(self) -> int:
        self.reads += 1
        if self.reads == 7:
            raise torch.OutOfMemoryError("as if")
        return super().allocated()


class OneRunsOut(CountedMemory):
    """Runs out once on rank 1 alone, when the forward of the fourth block of the first trial ends."""

    reads = 0

    def allocated(self) -> int:
        self.reads += 1
        if self.reads == 8 and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("as if")
        return super().allocated()


def both_after_one_failed(
    spec: str, budget: int, folder: str, by_hand: bool, device: type[CountedMemory] = RunsOut
) -> tuple[str, list[int]]:
    """`both`; with `by_hand` without torch 2.13's function that lets FSDP2 begin anew."""
    given = getattr(FSDPModule, "reset_iter_state", None)
    try:
        if by_hand and given is not None:
            del FSDPModule.reset_iter_state
        return both(spec, budget, device(), 2, folder)
    finally:
        if given is not None:
            FSDPModule.reset_iter_state = given


@pytest.mark.parametrize(
    ("spec", "budget", "by_hand"),
    [
        ("fsdp2", 3_600_000, True),
        more("fsdp2", 3_600_000, False),
        more("hsdp:dp_replicate=2", 4_500_000, True),
        more("ddp", 3_200_000, False),
        more("fsdp2:cp=2", 2_600_000, False),
        ("fsdp2:tp=2", 2_600_000, False),
    ],
)
def test_ranks(pool: RankPool, tmp_path: Path, spec: str, budget: int, by_hand: bool) -> None:
    """All ranks choose the same, also after a trial in whose forward memory ran out."""
    found = pool.run(2, both_after_one_failed, spec, budget, str(tmp_path), by_hand)
    assert not any(different for _, different in found)
    assert len({setting for setting, _ in found}) == 1


@pytest.mark.parametrize(
    ("spec", "budget"), [("fsdp2", 3_600_000), more("hsdp:dp_replicate=2", 4_500_000), more("ddp", 3_200_000)]
)
def test_one_rank_runs_out_in_a_forward(pool: RankPool, tmp_path: Path, spec: str, budget: int) -> None:
    """The other learns it before the next collective; both choose the same."""
    found = pool.run(2, both_after_one_failed, spec, budget, str(tmp_path), False, OneRunsOut)
    assert not any(different for _, different in found)
    assert len({setting for setting, _ in found}) == 1


def run_out_in_backward(folder: str) -> None:
    together.PATIENCE = 3.0

    def fail(gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("as if")

    def fails_in_backward(layer: Any, args: Any, output: Tensor) -> None:
        if os.environ["RANK"] == "1":
            output.register_hook(fail)

    model = tiny_model("llama", num_hidden_layers=6)
    model.model.layers[3].mlp.register_forward_hook(fails_in_backward)
    with pytest.raises(ValueError, match=r"ran out of memory in a trial .*: rank 1\. They cannot go on"):
        run("fsdp2:memory=0.1", 2, folder, CountedMemory(), model=model)
    print("the run has ended")


def test_one_rank_runs_out_in_a_backward(tmp_path: Path) -> None:
    """The other stands in a collective for ever: all end, with an error that names the rank."""
    job = Job(tmp_path / "logs", run_out_in_backward, str(tmp_path), world_size=2)
    codes = job.wait(60)
    assert ["the run has ended" in job.log(rank) for rank in (0, 1)] == [True, True], job.log() + job.log(1)
    assert codes[1] == 0


def run_out_on_one(folder: str) -> str:
    """The error of a run in which rank 1 alone says that it ran out of memory."""
    whole = trials._Trials._run

    def ends_early(self: Any) -> Any:
        place, kept = whole(self)
        return (("inside", 3, 0) if os.environ["RANK"] == "1" else place), kept

    try:
        trials._Trials._run = ends_early  # type: ignore[method-assign]
        run("ddp:memory=0.1", 2, folder, CountedMemory())
    except ValueError as error:
        return str(error)
    finally:
        trials._Trials._run = whole  # type: ignore[method-assign]
    return "no error"


def test_one_rank_runs_out(pool: RankPool, tmp_path: Path) -> None:
    """Ranks that ended a trial at different places cannot go on, and all say so."""
    for message in pool.run(2, run_out_on_one, str(tmp_path)):
        assert "some ranks ran out of memory in a trial" in message
        assert "rank 1. They" in message
        assert "Give less" in message


# --- what cannot be tried ---------------------------------------------------------------------------------------------


def test_nothing_fits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit: .*offload,tiled_mlp=4 took .*Make rows shorter"):
        run("fsdp2:memory=0.001", 1, str(tmp_path), CountedMemory())


def test_refused(tmp_path: Path) -> None:
    """Pipelines, a user's own steps, loaders that nobody knows the largest micro-batch of; a CPU counts nothing."""
    quiet: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "max_steps": 1, "default_root_dir": tmp_path}
    rows = [[row] for row in random_rows(1, 8, seed=0)]
    with pytest.raises(ValueError, match=r"cannot tell it\. Give fit a data module"):
        Trainer(strategy="fsdp2:memory=1", callbacks=[MemoryBudget(CountedMemory())], **quiet).fit(  # type: ignore[arg-type]
            CausalLMModule(tiny_model()), rows
        )
    with pytest.raises(ValueError, match="BoringModel runs its own"):
        Trainer(strategy="fsdp2:memory=1", **quiet).fit(BoringModel())
    with pytest.raises(ValueError, match="memory='80%' does not work with pp=2"):
        Parallel3DStrategy(pp=2, memory="80%")
    trainer = Trainer(strategy="fsdp2:memory=1", **quiet)
    with pytest.warns(UserWarning, match="has no effect on cpu"):
        trainer.fit(CausalLMModule(tiny_model()), MockDataModule(vocab_size=200, seq_len=8, num_samples=1))


# --- switching --------------------------------------------------------------------------------------------------------


def numbers(strategy: Any, model: nn.Module) -> tuple[int, list[Tensor]]:
    """The size of all that autograd saves in two steps, and the gradients."""
    saved: list[int] = []
    objective = NextToken(model)
    batch = random_rows(1, 32, seed=1)[0]
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            strategy.forward_backward(objective, [batch], torch.tensor(31))
    return sum(saved), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("compiled", [False, True])
def test_switching(compiled: bool) -> None:
    """A block that was switched does what one does that never was otherwise, whatever was before."""
    options: dict[str, Any] = {"compile": compiled, "compile_backend": "aot_eager"}

    def laid_out(**asked: Any) -> tuple[Any, nn.Module]:
        made = make_strategy("fsdp2:" + ",".join(f"{k}={v}" for k, v in {**options, **asked}.items()), 1)
        model = tiny_model()
        made.parallelize(model.train())
        return made, model

    strategy, model = laid_out(memory=1)
    choices: list[Any] = [("full:1", None), ("offload", 2), (None, None)]
    choices += [] if compiled else [("full", None), ("full", 2), ("selective:1", None)]
    for modes, tiles in choices:
        strategy.choose(Chosen(modes, tiles))
        kept, gradients = numbers(strategy, model)
        asked = {"activation_checkpointing": modes or "null", "tiled_mlp": tiles or "false"}
        wanted_kept, wanted = numbers(*laid_out(**asked))
        assert (modes, tiles, kept) == (modes, tiles, wanted_kept)
        assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
        assert bool(strategy.prepared.host.held) == (modes == "offload")
        strategy.prepared.host.release()


def test_the_ledger(tmp_path: Path) -> None:
    _, trainer = run("fsdp2:memory=50%", 1, str(tmp_path), CountedMemory())
    facts = next(c for c in trainer.callbacks if isinstance(c, Ledger)).facts
    assert facts["run"]["budget"]["blocks"] == 6
    rows = dict(ledger_rows(facts))
    assert rows["memory budget"].startswith("50% chose activation_checkpointing=null: a step of 128 tokens takes ")
