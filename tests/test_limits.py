"""The limits find what they are to find, and say why they are what they are; so does the emulated rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import processors, rounding
from tests.harness import Batch, NextToken, check_steps, close, make_strategy, random_rows, reference_steps, train_steps
from tests.limits import CAPS, UNIT, Wide, check_within
from tests.tiny import tiny_model

Rows = Callable[[int], list[Batch]]


def rows_of(step: int) -> list[Batch]:
    return random_rows(4, 24, seed=step)


def adam(model: Any, eps: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=eps)


def train(rows: Rows = rows_of, change: Callable[[Any], None] = lambda model: None) -> Any:
    model = tiny_model()
    change(model)
    return train_steps(make_strategy("auto", 1), NextToken(model), adam(model, 1e-3), rows, 2)


@pytest.fixture(scope="module")
def expected() -> Any:
    model = tiny_model()
    return reference_steps(model, adam(model, 1e-3), rows_of)


@pytest.fixture(scope="module")
def right() -> Any:
    return train()


def test_what_is_right_passes_and_is_exact_to_fp32(right: Any, expected: Any) -> None:
    check_steps(right, expected)
    assert {weight.dtype for weight in expected["weights"].values()} == {torch.float64}
    limits = expected["limits"]
    assert all(limit < CAPS["loss"] for limit in limits.loss)
    assert all(limit < CAPS["weights"] for limit in limits.weights.values())


def test_the_parts_of_a_model_are_all_of_it(right: Any, expected: Any) -> None:
    parts: list[Any] = [copy.copy(right), {**right, "history": [dict(step) for step in right["history"]]}]
    name = "model.layers.0.mlp.up_proj.weight"
    for step in parts[1]["history"]:
        step["gradients"] = {name: step["gradients"][name]}
    parts[1]["weights"] = {name: right["weights"][name]}
    check_steps(parts, expected)
    with pytest.raises(AssertionError):
        check_steps(parts[1:], expected)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_a_gradient_that_is_summed_twice_is_found(name: str, right: Any, expected: Any) -> None:
    wrong = copy.deepcopy(right)
    wrong["history"][1]["gradients"][name] *= 2
    with pytest.raises(AssertionError, match=rf"gradient of {name} of step 2: the error of 1.00e\+00 is \d+\.\d times"):
        check_steps(wrong, expected)


def test_a_label_that_is_dropped_is_found(expected: Any) -> None:
    def dropped(step: int) -> list[Batch]:
        rows = rows_of(step)
        rows[0]["labels"][0, int((rows[0]["labels"][0] != -100).nonzero()[-1])] = -100
        return rows

    with pytest.raises(AssertionError, match="loss of step 1"):
        check_steps(train(dropped), expected)


def test_a_reduction_that_is_missing_is_found(expected: Any) -> None:
    """Of one parameter only, as where a norm is replicated over ranks that see other tokens each."""

    def halve(model: Any) -> None:
        model.model.layers[1].input_layernorm.weight.register_hook(lambda gradient: gradient * 0.5)

    with pytest.raises(AssertionError, match="times the limit"):
        check_steps(train(change=halve), expected)


def test_what_adam_makes_of_rounding_is_told_from_a_defect() -> None:
    """With hardly an eps the smallest gradients' rounding decides about whole steps: no limit would find anything."""
    model = tiny_model(attention_bias=True)
    expected = reference_steps(model, adam(model, 1e-12), rows_of)
    assert max(expected["limits"].weights.values()) > CAPS["weights"]
    same = {"history": expected["history"], "weights": expected["weights"]}
    with pytest.raises(AssertionError, match="magnifies rounding: give its optimizer a larger eps"):
        check_steps(same, expected)


def test_a_miss_says_by_how_much_and_why() -> None:
    check_within("a sum", 1e-7, 2e-7, "two terms")
    with pytest.raises(AssertionError, match=r"a sum: the error of 6.00e-07 is 3.0 times the limit of 2.00e-07 \(two"):
        check_within("a sum", 6e-7, 2e-7, "two terms")
    with pytest.raises(AssertionError, match="nan"):
        check_within("a sum", float("nan"), 2e-7, "two terms")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_close_is_about_rounding(dtype: torch.dtype) -> None:
    a = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = a.double() @ a.double().T
    close(a @ a.T, want, 256)
    wrong = a @ a.T + (a @ a.T).roll(1)
    with pytest.raises(AssertionError, match=r"roundoff of sums of \d+ terms"):
        close(wrong, want, 256)


def test_wide_is_fp64_where_fp32_is_asked_for() -> None:
    x = torch.ones(3, dtype=torch.float64)
    with Wide():
        found = [x.float(), x.to(torch.float32), x.type(torch.float32), x.softmax(0, dtype=torch.float32)]
        found += [torch.zeros(2, dtype=torch.float32)]
    assert {t.dtype for t in found} == {torch.float64}


def test_wide_multiplies_groups() -> None:
    rows, weights = torch.randn(6, 16), torch.randn(3, 16, 8)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    want = torch.nn.functional.grouped_mm(rows, weights, offs=ends)
    with Wide():
        got = torch.nn.functional.grouped_mm(rows.double(), weights.double(), offs=ends)
    assert got.dtype == torch.float64
    close(want, got, 16)


@pytest.mark.parametrize("ulps", [1, 4])
def test_emulated_rounding(ulps: int) -> None:
    """A few units in the last place, as often up as down; the same for the same numbers; zeros stay."""
    before = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    before[::10] = 0
    before[1], before[2] = float("inf"), -float("inf")
    after = rounding.move(before.clone(), 7, ulps)
    assert torch.equal(after, rounding.move(before.clone(), 7, ulps))
    assert not torch.equal(after, rounding.move(before.clone(), 8, ulps))
    assert torch.equal(after[::10], before[::10])
    assert torch.equal(after[1:3], before[1:3])
    moved = ((after - before) / before.abs())[3:].nan_to_num() / (2 * UNIT)
    assert 0.5 < moved.abs().max() <= ulps + 0.5
    up, down = int((moved > 0).sum()), int((moved < 0).sum())
    assert min(up, down) > 0.7 * max(up, down) > 1000


def test_pairs_of_settings_all_meet() -> None:
    values = [sorted(set(column)) for column in zip(*processors.PAIRS)]
    for first in range(len(values)):
        for second in range(first):
            met = {(pair[first], pair[second]) for pair in processors.PAIRS}
            assert met == {(a, b) for a in values[first] for b in values[second]}
