"""How far a computation in fp32 may be from exact arithmetic: every limit of the numeric tests comes from here.

No limit is a number that some machine happened to keep. A processor sums in its own order, and its functions end in
their own last bits, so fp32 runs of two machines differ by rounding, which grows on the way. How much follows from

- the truth: the same run of plain torch on one device in fp64, from the same fp32 weights;
- the measured error of the one-device run in fp32 against it. Another layout, or another machine, rounds otherwise but
  not more, but for luck: `SAFETY` times the measured error is allowed. A tensor of few numbers can be right by luck, so
  that no tensor is held to less than the median of all;
- a floor: n terms that are each rounded to `UNIT`, in random directions, are off by UNIT · sqrt(n). It counts the
  tokens of a step, over which losses and gradients of weights are summed, each of which has been rounded `CHAIN` times
  on its way through the model;
- Adam: an error δ in a gradient moves the weight by lr · δ / (sqrt(v) + ε), which is a lot where the gradient is
  small. The exact run's own v says where. No error moves it by more than two whole steps, and where a gradient is
  exactly zero in every run there is none to amplify.

Tensors are compared in norms: the last item says why single numbers mean little.

`CAPS` are the tolerances with which `amt verify` finds its planted defects. A limit that must be above them would find
no defects: such a test's set-up is at fault (take a larger ε, or other weights), and it fails for that.
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from automodel_trainer.modules import isolation
from automodel_trainer.verification.report import TOLERANCES as CAPS

UNIT = 2.0**-24  # the most that rounding to fp32 changes a number, relative to it
SAFETY = 10.0  # two errors of the same kind and number, one of them by bad luck and the other by good
CHAIN = 8  # products, norms and softmax of the tiny models' few layers, and the loss
WIDTH = 64  # of the tiny models' widest sums
SMALL = 1e-4  # of the norm of all gradients: one that is smaller is zero but for rounding (`amt verify` says the same)
_exact = False


class Wide(TorchFunctionMode):
    """Computes in fp64 where code asks for fp32 by name, as norms, softmax and rotary embeddings do."""

    off = False

    def aside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which computes as it would elsewhere."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.off = True
            try:
                return function(*args, **kwargs)
            finally:
                self.off = False

        return call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.off:
            return func(*args, **(kwargs or {}))
        if func is Tensor.float:
            return args[0].double()
        if func is torch._grouped_mm:  # has no fp64
            return _grouped(*args, **(kwargs or {}))
        return func(*map(_wide, args), **{key: _wide(value) for key, value in (kwargs or {}).items()})


def _grouped(rows: Tensor, weights: Tensor, offs: Tensor, **options: Any) -> Tensor:
    ends = offs.tolist()
    return torch.cat([rows[start:end] @ w for start, end, w in zip([0, *ends], ends, weights)])


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def exactly() -> Iterator[None]:
    """Runs of `train_steps` and `reference_steps` are in fp64 within, from the fp32 weights that they are given."""
    global _exact
    _exact = True
    try:
        yield
    finally:
        _exact = False


@contextmanager
def computing(model: nn.Module) -> Iterator[None]:
    """Within `exactly()`: the model is widened, and what runs within computes in fp64. Else nothing happens."""
    if not _exact:
        yield
        return
    model.double()
    with Wide():
        yield


@contextmanager
def widened(precision: str) -> Iterator[None]:
    """Around a Trainer's run, which has the precision "64-true" where it is to be exact.

    What is proved of a model is proved as it would be elsewhere, because all runs share the proof.
    """
    if precision != "64-true":
        yield
        return
    with Wide() as wide, pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolation, "prove_isolation", wide.aside(isolation.prove_isolation))
        yield


def gains(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the last step multiplied an error of each number of a gradient by: lr / (sqrt(v) + ε) for Adam.

    Zero where v is: the gradient has always been exactly zero.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in state:
                continue
            root = (state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt()
            found[names[id(parameter)]] = torch.where(root > 0, group["lr"] / (root + group["eps"]), 0.0)
    return found


def with_limits(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run`, of one device, returns when it is exact, and as `limits` how far from it fp32 may be.

    Args:
        run: calls `train_steps` or `reference_steps` with a model and an optimizer of its own.
    """
    near = run()
    with exactly():
        truth = run()
    return {**truth, "limits": Limits.of(near, truth)}


@dataclass
class Limits:
    """Relative limits of a training run, by step and by name.

    Args:
        sizes: what the errors of weights are relative to.
    """

    loss: list[float]
    norm: list[float]
    gradients: list[dict[str, float]]
    weights: dict[str, float]
    sizes: dict[str, float]

    @classmethod
    def of(cls, near: dict[str, Any], truth: dict[str, Any], safety: float = SAFETY) -> Limits:
        steps = list(zip(near["history"], truth["history"], strict=True))
        floors = [roundoff(want["terms"]) for _, want in steps]
        scalars = {
            key: safety * max(abs(got[key] - want[key]) / abs(want[key]) for got, want in steps)
            for key in ("loss", "norm")
        }
        gradients = [_limits(gradient_errors(got, want), floor, safety) for (got, want), floor in zip(steps, floors)]
        return cls(
            [max(scalars["loss"], floor) for floor in floors],
            [max(scalars["norm"], floor) for floor in floors],
            gradients,
            *_after_adam(gradients, truth),
        )


def _limits(measured: dict[str, float], floor: float, safety: float = SAFETY) -> dict[str, float]:
    typical = statistics.median(measured.values())
    return {name: max(safety * max(error, typical), floor) for name, error in measured.items()}


def _after_adam(limits: list[dict[str, float]], truth: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Relative limits of weights, which are those of gradients amplified by every step; and what they are relative to.

    That is a weight's norm, but of one that began as zeros never less than what a `SMALL` gradient makes of it.
    """
    rounding = SAFETY * UNIT * len(limits) ** 0.5
    found, sizes = {}, {}
    for name, weight in truth["weights"].items():
        moved, least = torch.zeros(()), torch.zeros(())
        for step, of_step in zip(truth["history"], limits):
            gain = step["gains"].get(name, torch.zeros(1))
            each = scale(step, name) / max(1, int((gain > 0).sum())) ** 0.5 if name in step["gains"] else 0.0
            moved = moved + (gain * each * of_step.get(name, 0.0)).clamp(max=2 * step["lr"])
            least = least + (gain * SMALL * total(step) / gain.numel() ** 0.5).clamp(max=step["lr"])
        sizes[name] = max(float(weight.norm()), float(least.norm()), 1e-12)
        found[name] = rounding + float(moved.norm()) / sizes[name]
    return found, sizes


def roundoff(tokens: int) -> float:
    """What sums over so many tokens are off by at least, relative to a term."""
    return UNIT * float(CHAIN * tokens) ** 0.5


def scale(step: dict[str, Any], name: str) -> float:
    """What the error of a gradient is relative to."""
    return max(float(step["gradients"][name].norm()), SMALL * total(step))


def total(step: dict[str, Any]) -> float:
    """The norm of all gradients, as the optimizer had them."""
    if "total" not in step:
        step["total"] = torch.stack([gradient.norm() for gradient in step["gradients"].values()]).norm().item()
    return float(step["total"])


def gradient_errors(got: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """Relative errors of a step's gradients, those that `got` has."""
    return {
        name: float((gradient.double() - want["gradients"][name].double()).norm()) / scale(want, name)
        for name, gradient in got.get("gradients", {}).items()
    }


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm().clamp(min=1e-12)).item()


# --- checks -----------------------------------------------------------------------------------------------------------


def check_within(name: str, error: float, limit: float, because: str, cap: float | None = None) -> None:
    """Fail if `error` is above `limit`, and say by how much; or if the limit is above `cap`, and finds nothing."""
    _note(name, error, limit)
    if cap is not None and limit > cap:
        raise AssertionError(
            f"{name}: the limit of {limit:.1e} ({because}) is above {cap:.0e}, with which planted defects are found. "
            "The test's set-up magnifies rounding: give its optimizer a larger eps, or the model other weights."
        )
    if not error <= limit:
        raise AssertionError(
            f"{name}: the error of {error:.2e} is {error / limit if limit else float('inf'):.1f} times the limit of "
            f"{limit:.2e} ({because})"
        )


def _note(name: str, error: float, limit: float) -> None:
    """Append to the file that AMT_TEST_MARGINS names, for a look at how near to their limits errors are."""
    if os.environ.get("AMT_TEST_MARGINS"):
        with open(os.environ["AMT_TEST_MARGINS"], "a") as file:
            test = os.environ.get("PYTEST_CURRENT_TEST", "")
            file.write(f"{error / limit if limit else 0:.4f}\t{error:.2e}\t{limit:.2e}\t{name}\t{test}\n")


def close(
    got: Tensor, want: Tensor, terms: int = WIDTH, name: str = "result", dtype: torch.dtype | None = None
) -> None:
    """Hold a tensor against another way to compute it: each number is a sum of `terms`.

    Args:
        dtype: the narrowest that computes; that of `got` if not given. What is narrower than fp32 is summed in fp32 and
            rounded once.
    """
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} in place of {tuple(want.shape)}"
    unit = torch.finfo(dtype or got.dtype).eps / 2
    error = relative_error(got.double(), want.double())
    terms = 1 if unit > UNIT else terms
    check_within(name, error, SAFETY * unit * terms**0.5, f"{SAFETY:g} times the roundoff of sums of {terms} terms")


def check_step(got: tuple[Tensor | float, Mapping[str, Tensor]], want: Any, tokens: int, grown: float = 1.0) -> None:
    """Hold the loss and the gradients of one step against another way to compute them, both in fp32.

    Args:
        got: the loss, and gradients by the names of their parameters.
        want: the same of the other way.
        tokens: of the step.
        grown: by how much the model makes rounding grow, where `CHAIN` is not the whole of it.
    """
    (loss, gradients), (wanted, exact) = got, want
    limit, because = SAFETY * grown * roundoff(tokens), f"{SAFETY * grown:g} times the roundoff of {tokens} tokens' sum"
    check_within("loss", abs(float(loss) - float(wanted)) / abs(float(wanted)), limit, because)
    assert gradients.keys() == exact.keys()
    step = {"gradients": exact}
    for name, error in gradient_errors({"gradients": gradients}, step).items():
        check_within(f"gradient of {name}", error, limit, because)


def check_losses(got: Sequence[float], want: Sequence[float], tokens: int) -> None:
    """Hold losses of a few steps, each over `tokens`, against another way to compute them, both in fp32.

    Errors of weights add up over the steps.
    """
    assert len(got) == len(want)
    for index, (found, wanted) in enumerate(zip(got, want), start=1):
        limit = SAFETY * roundoff(tokens) * index**0.5
        because = f"{SAFETY:g} times the roundoff of {tokens} tokens' sum, over {index} steps"
        check_within(f"loss of step {index}", abs(found - wanted) / abs(wanted), limit, because)


def check_casts(got: Mapping[str, Any], want: Mapping[str, Any], exact: Mapping[str, Any], tokens: int) -> None:
    """Hold a run that casts to 8 bits against another way to compute the same run.

    Where rounding moves a number over the middle between two values of the narrow type, it is cast to the other one.
    With e4m3's 3 bits of mantissa and numbers that are off by r, this befalls a share 2 · 2⁴ · r of all. In the first
    step the two runs are as far apart as casting so many of the numbers costs, in random directions. Later ones begin
    with other weights: they are held to what the casts cost altogether.

    Args:
        got: of `train_steps`.
        want: the same.
        exact: of a run that casts nothing: it shows what casting all of the numbers costs.
        tokens: of a step.
    """
    share = recast_share(tokens)
    steps = list(zip(got["history"], want["history"], exact["history"], strict=True))
    of_loss = max(abs(wanted["loss"] - truth["loss"]) for _, wanted, truth in steps)  # one step may be right by luck
    for index, (found, wanted, truth) in enumerate(steps):
        assert found["gradients"].keys() == wanted["gradients"].keys()
        part = 1.0 if index else share
        cost = part * run_error(wanted["gradients"], truth["gradients"])
        because, at = f"{part:.2f} times what the casts cost", f"of step {index + 1}"
        luck = SAFETY if index else share  # it is one number
        check_within(
            f"loss {at}", abs(found["loss"] - wanted["loss"]), luck * of_loss, f"{luck:.2f} times what the casts cost"
        )
        check_within(f"gradient norm {at}", abs(found["norm"] / wanted["norm"] - 1), cost, because)
        check_within(f"gradients {at}", run_error(found["gradients"], wanted["gradients"]), cost, because)
    cost = run_error(want["weights"], exact["weights"])
    check_within("weights", run_error(got["weights"], want["weights"]), cost, because)


def recast_share(tokens: int, bits: int = 3) -> float:
    """How far apart two runs are that round numbers otherwise before they cast them, relative to what the casts cost.

    Args:
        tokens: of a step.
        bits: of the mantissa of what is cast to: 3 of e4m3, 7 of bf16.
    """
    return SAFETY * float(2 * 2 ** (bits + 1) * roundoff(tokens)) ** 0.5


def run_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """Relative error of all tensors together."""
    return relative_error(*(torch.cat([run[name].double().flatten() for name in want]) for run in (got, want)))


def check_run(
    got: Mapping[str, Any], exact: Mapping[str, Any], near: Mapping[str, Any], terms: int, kind: str = "weights"
) -> None:
    """Hold tensors or numbers of a whole run against those of one device, by their names.

    Args:
        exact: of one device in fp64.
        near: of one device in fp32.
        terms: the tokens of a step.
        kind: which cap holds for them.
    """
    measured = {name: _error(near[name], value) for name, value in exact.items()}
    assert got.keys() == exact.keys()
    for name, limit in _limits(measured, roundoff(terms)).items():
        check_within(name, _error(got[name], exact[name]), limit, MEASURED, CAPS[kind])


def check_decided(logits: Tensor, near: Tensor) -> None:
    """Greedy choices are the same on every machine: the best logit leads by more than rounding could change.

    Args:
        logits: of the choices, exact.
        near: the same in fp32.
    """
    first, second = logits.double().topk(2).values.unbind(-1)
    error = SAFETY * float((logits.double() - near.double()).abs().max())
    lead = float((first - second).min())
    assert 2 * error < lead, f"a choice by {lead:.1e}, where rounding may be {error:.1e}: take other weights"


def _error(value: Any, reference: Any) -> float:
    return relative_error(*(torch.as_tensor(v, dtype=torch.float64) for v in (value, reference)))


MEASURED = f"{SAFETY:g} times the error of one device's fp32 against its fp64, or the roundoff of the tokens' sum"
AMPLIFIED = "the limits of the gradients times lr / (sqrt(v) + eps) of every step, and the roundoff of the weight"


def check_steps(
    results: dict[str, Any] | Sequence[dict[str, Any]], expected: dict[str, Any], caps: Mapping[str, float] = CAPS
) -> None:
    """Hold what `train_steps` returned against `expected` (of `with_limits`, or `reference_steps`).

    Args:
        results: of one rank, which has all; or of the ranks that have it together, as a pipeline's. A Trainer's run
            has no gradients to show.
    """
    results, limits = [results] if isinstance(results, dict) else results, expected["limits"]
    for index, want in enumerate(expected["history"]):
        at = f"of step {index + 1}"
        for got in (result["history"][index] for result in results):
            for key, limit, cap in (("loss", limits.loss, "loss"), ("norm", limits.norm, "gradient norm")):
                error = abs(got[key] - want[key]) / abs(want[key])
                check_within(f"{cap} {at}", error, limit[index], MEASURED, caps[cap])
            for name, error in gradient_errors(got, want).items():
                limit = limits.gradients[index][name]
                check_within(f"gradient of {name} {at}", error, limit, MEASURED, caps["gradients"])
        names = set().union(*(r["history"][index].get("gradients", want["gradients"]) for r in results))
        assert names == want["gradients"].keys()
    for result in results:
        for name, weight in result["weights"].items():
            error = float((weight.double() - expected["weights"][name]).norm()) / limits.sizes[name]
            check_within(f"weight {name}", error, limits.weights[name], AMPLIFIED, caps["weights"])
    assert set().union(*(result["weights"] for result in results)) == expected["weights"].keys()


def copy_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Both, the optimizer's parameters being those of the model still."""
    return copy.deepcopy((model, optimizer))
