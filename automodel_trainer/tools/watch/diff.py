"""`amt diff`: where two runs part. Configuration, data, the first step whose loss differs, and where time went.

amt diff runs/a runs/b
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from automodel_trainer.callbacks.console import Row, block
from automodel_trainer.nn.chart import Curve, finite, short
from automodel_trainer.tools.watch.run import Run, read_run, settings

NOWHERE = "–"
NEUTRAL = ("trainer.default_root_dir",)  # where a run lies is not what it does
TIMES = (
    "tokens_per_second", "mfu", "tflops_per_device", "peak_memory_gib", "data_wait", "padding_share",
    "supervised_share", "pipeline_bubble",
)  # fmt: skip
Facts = dict[str, Any]


def diff(first: Run, second: Run, tolerance: float = 1e-5) -> Facts:
    """What differs between two runs, as plain data.

    Args:
        first, second: runs from `read_run`.
        tolerance: largest relative difference of two losses that counts as equal.

    Returns:
        `config` and `ledger`: name → the two values; `first_row`: whether both saw the same first row (None: unknown);
        `loss`: by name of the curve `steps` (in both runs), `first_different` (step and both values, or None) and
        `largest` (relative difference); `time`: name → the two means over all log steps.
    """
    rows = [first.ledger.get("first_row"), second.ledger.get("first_row")]
    return {
        "config": _different(_settings(first), _settings(second)),
        "ledger": _different(dict(first.rows()), dict(second.rows())),
        "first_row": None if None in rows else rows[0] == rows[1],
        "loss": {
            name: compare(first.curves[name], second.curves[name], tolerance)
            for name in first.curves
            if "loss" in name and name in second.curves
        },
        "time": {
            name: (_mean(first.curves.get(name)), _mean(second.curves.get(name)))
            for name in TIMES
            if name in first.curves or name in second.curves
        },
    }


def compare(first: Curve, second: Curve, tolerance: float) -> Facts:
    """The first step at which two curves differ, and their largest relative difference, over the steps of both."""
    both = [step for step in first if step in second]
    errors = {step: _relative(first[step], second[step]) for step in both}
    apart = next((step for step, error in errors.items() if error > tolerance), None)
    different = None if apart is None else {"step": apart, "values": (first[apart], second[apart])}
    return {"steps": len(both), "first_different": different, "largest": max(errors.values(), default=0.0)}


def _relative(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) / max(abs(a), abs(b)) if math.isfinite(a) and math.isfinite(b) else math.inf


def _mean(curve: Curve | None) -> float | None:
    values = list(finite(curve or {}).values())
    return fmean(values) if values else None


def _settings(run: Run) -> dict[str, Any]:
    return {name: value for name, value in settings(run).items() if name not in NEUTRAL}


def _different(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [*first, *(name for name in second if name not in first)]
    pairs = {name: (first.get(name, NOWHERE), second.get(name, NOWHERE)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def text(facts: Facts, names: tuple[str, str]) -> str:
    """The differences as boxes of text.

    Args:
        facts: from `diff`.
        names: of the two runs.
    """
    parts = [block("runs", [("A", names[0]), ("B", names[1])])]
    for part in ("config", "ledger"):
        rows = [(name, f"{_value(pair[0])}  →  {_value(pair[1])}") for name, pair in facts[part].items()]
        parts.append(block(part, rows or [("", "the same, as far as both have one")]))
    parts.append(block("data", [("first row", _SAME[facts["first_row"]])]))
    losses = [(name, loss_text(compared)) for name, compared in facts["loss"].items()]
    parts.append(block("loss", losses or [("", "no curve is in both")]))
    times: list[Row] = [
        (name, f"{_mean_text(a)}  →  {_mean_text(b)}{_change(a, b)}") for name, (a, b) in facts["time"].items()
    ]
    parts.append(block("time and memory, means of the log steps", times or [("", "neither run has logged any")]))
    return "\n".join(parts)


_SAME = {None: "unknown: the ledger of a run does not have it", True: "the same", False: "another one"}


def loss_text(compared: Facts) -> str:
    """One line about two curves that `compare` has compared."""
    different = compared["first_different"]
    if not compared["steps"]:
        return "no step is in both"
    if different is None:
        return f"equal at all {compared['steps']} steps of both (largest difference {compared['largest']:.1e})"
    a, b = different["values"]
    return f"differs first at step {different['step']:,}: {a:.6g}  →  {b:.6g}; at most {compared['largest']:.1%}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _mean_text(value: float | None) -> str:
    return NOWHERE if value is None else short(value)


def _change(a: float | None, b: float | None) -> str:
    return f"  ({b / a - 1:+.1%})" if a and b is not None else ""


def main(argv: Sequence[str]) -> None:
    """The command line: print what differs.

    Raises:
        ValueError: a folder is none of a run.
        SystemExit: with code 1, if losses differ.
    """
    parser = argparse.ArgumentParser(prog="amt diff", description="Show where two runs part. It only reads.")
    parser.add_argument("first", type=Path, help="a run's default_root_dir")
    parser.add_argument("second", type=Path, help="another run's")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="relative; losses closer are equal (default: 1e-5)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args(list(argv))
    facts = diff(read_run(args.first), read_run(args.second), args.tolerance)
    print(json.dumps(facts, indent=2, default=str) if args.json else text(facts, (str(args.first), str(args.second))))
    if any(compared["first_different"] for compared in facts["loss"].values()):
        raise SystemExit(1)
