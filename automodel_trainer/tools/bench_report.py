"""The results of a benchmark, as numbers and as text."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from automodel_trainer.callbacks.counts import Totals
from automodel_trainer.tools.bench_ceilings import Ceilings


@dataclass(frozen=True)
class Work:
    """FLOPs of the model for one token, forward and backward, without recomputation."""

    matmul: float
    attention: float


def results(
    seconds: list[float], warmup: list[float], data_seconds: float, totals: Totals, world_size: int
) -> dict[str, Any]:
    """Speed of the measured steps.

    Args:
        seconds: durations of the measured steps on this rank.
        warmup: durations of the warm-up steps.
        data_seconds: total time that the host waited for data.
        totals: counts of the measured steps over all ranks.
        world_size: number of ranks.
    """
    step = statistics.median(seconds)
    found = {
        "steps": len(seconds),
        "step_seconds": step,
        "step_seconds_spread": spread(seconds),
        "data_share": data_seconds / sum(seconds),
        "startup_seconds": sum(max(0.0, s - step) for s in warmup),
    }
    if not totals.tokens:
        return {**found, "samples_per_second": totals.rows / len(seconds) / step}
    tokens = totals.tokens / len(seconds) / step
    return {**found, "tokens_per_second": tokens, "tokens_per_second_per_device": tokens / world_size}


def efficiency(tokens_per_second: float, work: Work, ceilings: Ceilings, peak: float | None) -> dict[str, float]:
    """The speed of one device relative to its data sheet and to the measured ceilings.

    Args:
        tokens_per_second: tokens per second of one device.
        work: FLOPs per token.
        ceilings: measured on the device.
        peak: FLOP/s of the data sheet, if known.
    """
    least = work.matmul / ceilings.matmul + work.attention / ceilings.attention  # minimum seconds per token
    found = {
        "tflops_per_device": (work.matmul + work.attention) * tokens_per_second / 1e12,
        "share_of_ceilings": least * tokens_per_second,
        "ceiling_tokens_per_second": 1 / least,
        "ceiling_matmul_tflops": ceilings.matmul / 1e12,
        "ceiling_attention_tflops": ceilings.attention / 1e12,
        "ceiling_copy_gb_per_second": ceilings.copy / 1e9,
    }
    return found | ({"mfu": (work.matmul + work.attention) * tokens_per_second / peak} if peak else {})


def spread(values: list[float]) -> float:
    """Half the distance between the first and the last decile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return (ordered[round(0.9 * last)] - ordered[round(0.1 * last)]) / 2


def text(found: dict[str, Any]) -> str:
    """The results as a few lines of text."""
    half = 100 * found["step_seconds_spread"] / found["step_seconds"]
    rows = [("step", f"{_duration(found['step_seconds'])} ± {half:.1f} % (median of {found['steps']} steps)")]
    if "tokens_per_second" in found:
        each = found["tokens_per_second_per_device"]
        rows.append(("throughput", f"{found['tokens_per_second']:,.0f} tok/s, {each:,.0f} tok/s per device"))
    else:
        rows.append(("throughput", f"{found['samples_per_second']:,.1f} samples/s"))
    if "tflops_per_device" in found:
        mfu = f", MFU {found['mfu']:.1%} of the data sheet" if "mfu" in found else ""
        share, most = found["share_of_ceilings"], found["ceiling_tokens_per_second"]
        matmul, attention = found["ceiling_matmul_tflops"], found["ceiling_attention_tflops"]
        copy = found["ceiling_copy_gb_per_second"]
        rows += [
            ("compute", f"{found['tflops_per_device']:,.3g} TFLOP/s per device{mfu}"),
            ("of the ceilings", f"{share:.1%}: matmuls and attention alone would allow {most:,.0f} tok/s per device"),
            ("ceilings", f"matmul {matmul:,.3g} TFLOP/s, attention {attention:,.3g} TFLOP/s, copy {copy:,.3g} GB/s"),
        ]
    rows += [
        ("peak memory", f"{found['peak_memory_gib']:.2f} GiB per device"),
        ("waiting for data", f"{found['data_share']:.1%} of the time"),
        ("start-up", f"{found['startup_seconds']:.1f} s more than the median (compilation, allocation), not counted"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {value}" for name, value in rows)


def _duration(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"
