from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from automodel_trainer import CausalLMModule, Trainer
from automodel_trainer.modules.optim import (
    OptimizerConfig,
    SchedulerConfig,
    build_optimizer,
    build_scheduler,
    check_lr,
)
from tests.harness import make_strategy
from tests.pool import RankPool
from tests.tiny import tiny_model, tiny_tokenizer


def curve(config: SchedulerConfig | str, steps: int, total: int | None) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(config, optimizer, total)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_no_decay_on_norms_and_biases(family: str) -> None:
    """The biases of gpt_oss's experts are `[experts, out]`."""
    model = tiny_model(family)
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.1), model, 1e-3)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.1 for p in g["params"]}
    free = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.0 for p in g["params"]}
    for name, parameter in model.named_parameters():
        vector = name.endswith(("bias", "sinks")) or ".ln_" in name or "norm" in name
        assert (id(parameter) in free) == vector, name
    assert len(decayed) + len(free) == len(list(model.parameters()))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"]


def test_any_class_path() -> None:
    optimizer = build_optimizer(OptimizerConfig("torch.optim.SGD", args={"momentum": 0.9}), tiny_model(), 0.1)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9
    assert isinstance(build_optimizer("Adagrad", tiny_model(), 0.1), torch.optim.Adagrad)
    assert isinstance(build_optimizer(lambda groups: torch.optim.SGD(groups, lr=1), tiny_model(), 0.1), torch.optim.SGD)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("AdamX", "Did you mean"),
        (OptimizerConfig("torch.optim.AdamW", args={"beta": 1}), "Did you mean 'betas'"),
        ("nowhere.at.all.Adam", "cannot be imported"),
    ],
)
def test_bad_optimizers(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(config, tiny_model(), 0.1)


@pytest.mark.parametrize("lr", ["1e-3", None, True, float("nan"), float("inf"), -1.0])
def test_bad_learning_rates(lr: Any) -> None:
    """YAML reads 1e-3 as a text."""
    with pytest.raises(ValueError, match=f"lr='?{lr}"):
        check_lr(lr)
    for good in (0, np.float32(1e-3), torch.tensor(1e-3)):
        check_lr(good)


@pytest.mark.parametrize("norm", [-1.0, float("nan")])
def test_bad_norms(norm: float) -> None:
    with pytest.raises(ValueError, match=f"gradient_clip_val={norm} is no norm"):
        CausalLMModule(tiny_model(), tokenizer=tiny_tokenizer(), gradient_clip_val=norm)
    with pytest.raises(ValueError, match=f"gradient_clip_val={norm} is no norm"):
        Trainer(gradient_clip_val=norm)
    with pytest.raises(ValueError, match="accumulate_grad_batches=0 must be at least 1"):
        Trainer(accumulate_grad_batches=0)


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="No parameter of the model is trainable"):
        build_optimizer("AdamW", tiny_model().requires_grad_(False), 0.1)


def test_against_transformers() -> None:
    """The decay is theirs; the warm-up starts at 1/n instead of a wasted step at 0."""
    for name, make in (("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = make(optimizer, 4, 20)
        expected = [theirs.lr_lambdas[0](step) for step in range(20)]
        ours = curve(SchedulerConfig(name, warmup_steps=4), 20, 20)
        assert ours[:4] == [0.25, 0.5, 0.75, 1.0]
        assert ours[4:] == pytest.approx(expected[4:])


def test_shapes() -> None:
    assert curve("constant", 3, None) == [1, 1, 1]
    assert curve(SchedulerConfig("cosine", min_lr_ratio=0.1), 11, 10)[-1] == pytest.approx(0.1)
    wsd = curve(SchedulerConfig("wsd", warmup_ratio=0.1, decay_ratio=0.5), 21, 20)
    assert wsd[:2] == [0.5, 1.0]
    assert wsd[10] == 1.0
    assert wsd[15] == pytest.approx((1 - 13 / 18) / 0.5)
    assert wsd[20] == 0


@pytest.mark.parametrize(
    ("config", "total", "message"),
    [
        ("cosin", 10, "Allowed: cosine"),
        (SchedulerConfig(warmup_steps=2, warmup_ratio=0.1), 10, "not both"),
        (SchedulerConfig(warmup_steps=10), 10, "must be less than"),
        (SchedulerConfig(min_lr_ratio=2.0), 10, r"min_lr_ratio must be in \[0, 1\]"),
        (SchedulerConfig("wsd", decay_ratio=0.0), 10, r"decay_ratio in \(0, 1\]"),
        ("constant", 0, "the run has no steps to train"),
        (SchedulerConfig(warmup_ratio=1.5), 10, "invalid warm-up"),
        ("cosine", None, "max_steps"),
    ],
)
def test_bad_schedules(config: Any, total: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curve(config, 1, total)


class Kinds(TorchDispatchMode):
    """Notes what Adam's kernel is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[type] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "adam" in func.__name__:
            self.seen |= {type(tensor) for tensors in args[:4] for tensor in tensors}
        return func(*args, **(kwargs or {}))


def adam_steps(name: str, args: dict[str, Any], ours: bool) -> tuple[list[torch.Tensor], set[type]]:
    """Weights and state after three steps of shards, of which one is empty; and what the kernel was given."""
    mesh, kinds = make_strategy("fsdp2", 2).device_mesh["dp_shard"], Kinds()
    torch.manual_seed(0)
    model = nn.Module()
    for key, rows in (("even", 4), ("uneven", 3), ("one", 1)):
        model.register_parameter(key, nn.Parameter(distribute_tensor(torch.randn(rows, 2), mesh, [Shard(0)])))
    theirs = getattr(torch.optim, name)
    config = (
        OptimizerConfig(name, 0.1, args) if ours else lambda groups: theirs(groups, lr=0.1, weight_decay=0.1, **args)
    )
    optimizer = build_optimizer(config, model, 0.1)
    assert type(optimizer).__name__ == name
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = distribute_tensor(torch.randn(parameter.shape), mesh, [Shard(0)])
        with kinds:
            optimizer.step()
    state = [value for parameter in model.parameters() for value in optimizer.state[parameter].values()]
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in (*model.parameters(), *state)], kinds.seen


def both(name: str, args: dict[str, Any]) -> tuple[bool, bool, bool]:
    (got, on_shards), (want, on_wholes) = (adam_steps(name, args, ours) for ours in (True, False))
    return len(got) == len(want) and all(map(torch.equal, got, want)), DTensor in on_wholes, DTensor in on_shards


@pytest.mark.parametrize(("name", "args"), [("AdamW", {"fused": True}), ("Adam", {"fused": True, "amsgrad": True})])
def test_adam_steps_on_shards(pool: RankPool, name: str, args: dict[str, Any]) -> None:
    """Bit for bit as torch's class, which hands the kernel DTensors."""
    assert pool.run(2, both, name, args) == [(True, True, False)] * 2
