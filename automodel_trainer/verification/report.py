"""The report of a verification: errors and tolerances, the verdict, and where a difference begins."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from automodel_trainer.nn.html_table import html_table
from automodel_trainer.verification.flips import by_rounding, describe, first_flips
from automodel_trainer.verification.steps import Comparison, Reference

TOLERANCES = {"loss": 1e-5, "gradient norm": 1e-4, "gradients": 1e-4, "weights": 1e-4, "outputs": 1e-4}
"""Relative errors allowed in fp32. The order of summation alone causes less than a tenth of them."""

_VERDICTS = {
    0: "[green]same numbers as one device[/]",
    1: "[red]NOT the numbers of one device[/]",
    3: "[yellow]undecided: rounding decided a router's choice in every attempt[/]",
}


@dataclass
class Quantity:
    """The largest relative error of one quantity over all ranks.

    Args:
        name: of the quantity, a key of `TOLERANCES`.
        step: the optimizer step, from 1; None means after the last.
        error: the largest relative error.
        tolerance: the largest error allowed.
        where: the parameter with the largest error.
        ranks: the ranks with an error above the tolerance.
        count: how many parameters have an error above the tolerance, and how many there are.
    """

    name: str
    step: int | None
    error: float
    tolerance: float
    where: str = ""
    ranks: list[int] = field(default_factory=list)
    count: tuple[int, int] = (0, 0)

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass
class Report:
    """The result of verifying one layout.

    Args:
        layout: the layout, in words.
        model: the small model, in words.
        quantities: what was compared.
        module: the first module in forward order whose output differs, and its error; None if no output differs.
        findings: what the pattern of errors shows, one sentence or more each.
        modules_compared: how many modules had their output compared.
        seconds: the time of all attempts.
        margin: the smallest gap of a choice (of experts) on one device, as a part of its scores; None if the model
            made no choice with a gap.
        choices: how many choices one device made.
        flipped: how many of them the layout made differently, in all attempts. Consequences of other flips do not
            count.
        undecided: the numbers differ, and rounding may have decided a choice, so the report does not judge the layout.
        attempts: how many were made, each with other random weights.
    """

    layout: str
    model: str
    quantities: list[Quantity]
    module: tuple[str, float] | None = None
    findings: list[str] = field(default_factory=list)
    modules_compared: int = 0
    seconds: float = 0.0
    margin: float | None = None
    choices: int = 0
    flipped: int = 0
    undecided: bool = False
    attempts: int = 1

    @property
    def passed(self) -> bool:
        """Whether every quantity is within its tolerance."""
        return all(quantity.passed for quantity in self.quantities)

    @property
    def exit_code(self) -> int:
        """0 if the numbers are the same, 1 if they differ, 3 if undecided."""
        return 0 if self.passed else 3 if self.undecided else 1

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        quantities = [{**asdict(q), "passed": q.passed} for q in self.quantities]
        return {**asdict(self), "quantities": quantities, "passed": self.passed}

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        rows = [
            (q.name, q.step or "end", f"{q.error:.1e}", f"at most {q.tolerance:.0e}", "same" if q.passed else "differs")
            for q in self.quantities
        ]
        below = " ".join([*self.findings, re.sub(r"\[/?[^\]]*\]", "", _VERDICTS[self.exit_code])])
        return html_table(f"{self.model}: {self.layout}, against one device", rows, below)

    def print(self, console: Console | None = None) -> None:
        """Print the table, the findings and the verdict."""
        console = console or Console()
        table = Table(title=f"{self.model}\n{self.layout}, against one device", title_justify="left")
        for column in ("quantity", "step", "relative error", "allowed", ""):
            table.add_column(column, justify="right" if column in ("relative error", "allowed") else "left")
        for q in self.quantities:
            mark = "[green]same[/]" if q.passed else f"[red]differs[/] {q.where}".rstrip()
            table.add_row(q.name, str(q.step or "end"), f"{q.error:.1e}", f"{q.tolerance:.0e}", mark)
        console.print(table)
        for finding in self.findings:
            console.print(f"• {finding}", highlight=False)
        if self.margin is not None:
            console.print(
                f"{self.choices} choices (top-k, as of experts), each with a gap of at least {self.margin:.1e} of its "
                "scores"
            )
        verdict = _VERDICTS[self.exit_code]
        console.print(f"{verdict} ({self.modules_compared} module outputs compared, {self.seconds:.0f} s)")


def compile_report(layout: str, model: str, ranks: list[Comparison], reference: Reference) -> Report:
    """The report on a layout, from the comparisons of all its ranks.

    Args:
        layout, model: in words.
        ranks: the comparison of every rank.
        reference: the run on one device.
    """
    steps = range(len(ranks[0].loss))
    scalars = [_scalar("loss", s, [r.loss[s] for r in ranks]) for s in steps]
    scalars += [_scalar("gradient norm", s, [r.norm[s] for r in ranks]) for s in steps]
    tensors = [_tensors("gradients", s + 1, [r.gradients[s] for r in ranks]) for s in steps]
    tensors.append(_tensors("weights", None, [r.weights for r in ranks]))
    report = Report(layout, model, [*scalars, *tensors])
    report.modules_compared = len({name for rank in ranks for name in rank.outputs})
    report.module = _first_different(ranks)
    _look_at_choices(report, ranks, reference)
    if not report.passed and not report.undecided:
        report.findings += _findings(report, ranks)
    if report.undecided:
        report.module = None
    return report


def _look_at_choices(report: Report, ranks: list[Comparison], reference: Reference) -> None:
    """Add margin and flips. The report is undecided if nothing differs before a choice that rounding decided."""
    margin, limit = reference.margin, reference.limit
    if not margin.choices:
        return
    report.margin, report.choices = margin.smallest if math.isfinite(margin.smallest) else None, margin.choices
    flips = first_flips([rank.flips for rank in ranks])
    report.flipped = sum(flip.count for flip in flips)
    if report.passed:
        return
    if flips:
        report.findings.append(describe(flips, margin.choices, limit))
    first = min(_moment(q)[0] for q in report.quantities if not q.passed)
    if flips:
        report.undecided = by_rounding(flips, limit) and first >= flips[0].step + 1
    elif margin.smallest <= limit and _unseen(ranks):
        report.undecided = True
        report.findings.append(
            f"A choice in {margin.module} has a gap of {margin.smallest:.0e} of its scores, which is less than "
            f"rounding ({limit:.0e}), and the layout's choice could not be seen. This says nothing about the layout."
        )


def _unseen(ranks: list[Comparison]) -> bool:
    """Whether there are choices that no rank compared."""
    return not any(rank.flips.compared for rank in ranks) or bool(
        set.intersection(*(rank.flips.missed for rank in ranks))
    )


def _scalar(name: str, step: int, errors: list[float]) -> Quantity:
    tolerance = TOLERANCES[name]
    return Quantity(name, step + 1, max(errors), tolerance, ranks=_off(errors, tolerance))


def _tensors(name: str, step: int | None, ranks: list[dict[str, float]]) -> Quantity:
    tolerance = TOLERANCES[name]
    # ranks of a pipeline have different parameters
    names = dict.fromkeys(key for rank in ranks for key in rank)
    worst = {key: max(rank.get(key, 0.0) for rank in ranks) for key in names}
    where = max(worst, key=worst.__getitem__)
    off = _off([max(rank.values()) for rank in ranks], tolerance)
    count = sum(error > tolerance for error in worst.values())
    return Quantity(name, step, worst[where], tolerance, where, off, (count, len(worst)))


def _off(errors: list[float], tolerance: float) -> list[int]:
    return [rank for rank, error in enumerate(errors) if not error <= tolerance]


def _first_different(ranks: list[Comparison]) -> tuple[str, float] | None:
    for name in dict.fromkeys(name for rank in ranks for name in rank.outputs):
        error = max(rank.outputs.get(name, 0.0) for rank in ranks)
        if error > TOLERANCES["outputs"]:
            return name, error
    return None


def _findings(report: Report, ranks: list[Comparison]) -> list[str]:
    first = min((q for q in report.quantities if not q.passed), key=_moment)
    gradients = next(q for q in report.quantities if q.name == "gradients")
    found = []
    if report.module is not None:
        name, error = report.module
        found.append(f"The first module in forward order whose output differs is {name} (by {error:.1e}).")
    elif first.name == "loss":
        found.append(
            f"Every module's output is the same, but the loss of step {first.step} differs: look at the targets (is a "
            "label lost where the sequence is split?) and at the number of tokens that divides the loss."
        )
    else:
        found.append("Every module's output is the same: the difference arises in backward or in the reductions.")
    found += _about_gradients(gradients, ranks)
    if first.ranks and len(first.ranks) < len(ranks):
        found.append(f"Only rank(s) {first.ranks} of {len(ranks)} differ: ranks disagree on what they should share.")
    return found


def _moment(quantity: Quantity) -> tuple[float, int]:
    """When a run computes a quantity, to sort by."""
    return quantity.step or float("inf"), ("loss", "gradients", "gradient norm", "weights").index(quantity.name)


def _about_gradients(gradients: Quantity, ranks: list[Comparison]) -> list[str]:
    count, total = gradients.count
    if not count:
        return []
    scales = [rank.scale for rank in ranks]
    if all(scale is not None and abs(scale - 1) > 1e-3 for scale in scales):
        factors = sorted({f"{scale:.3g}" for scale in scales})
        return [f"All gradients are {' or '.join(factors)} times those of one device: a sum or division is wrong."]
    tolerance = gradients.tolerance
    names_of_all = dict.fromkeys(name for rank in ranks for name in rank.gradients[0])
    off = [n for n in names_of_all if any(rank.gradients[0].get(n, 0.0) > tolerance for rank in ranks)]
    names = ", ".join(off[:4]) + (", …" if count > 4 else "")
    return [f"{count} of {total} gradients of step 1 differ: {names}"]
