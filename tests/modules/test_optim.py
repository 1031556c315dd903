from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from automodel_trainer.modules.optim import OptimizerConfig, SchedulerConfig, build_optimizer, build_scheduler
from tests.tiny import tiny_model


def curve(config: SchedulerConfig | str, steps: int, total: int | None) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(config, optimizer, total)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_no_decay_on_norms_and_biases() -> None:
    model = tiny_model("gpt2")
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.1), model, 1e-3)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.1 for p in g["params"]}
    free = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.0 for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in free) == (name.endswith("bias") or ".ln_" in name), name
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
        (SchedulerConfig(warmup_ratio=1.5), 10, "invalid warm-up"),
        ("cosine", None, "max_steps"),
    ],
)
def test_bad_schedules(config: Any, total: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curve(config, 1, total)
