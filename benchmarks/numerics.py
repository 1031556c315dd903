"""Compare every fast path with plain eager fp32 arithmetic, forward and backward, on this machine's device.

    python -m benchmarks.numerics                  # all cases: under a minute on one H100
    python -m benchmarks.numerics --cases ring fp8 --seed 7

Each case prints a line: the relative error ‖out − reference‖ / ‖reference‖ of the output and of all gradients together,
the limit (fp32 1e-5, bf16 1e-2; for fp8 see its recipe), and whether the case passes. Inputs are random; their seed is
printed. Lengths are odd, some labels are not trained, and some queries attend to nothing. The exit code is 1 if a case
fails. On a CPU (and in `tests/test_numerics.py`, which runs the same cases) cases are small and fp8 is emulated.

Look at the column `ok`. If a case raises, its line has the error message instead.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.numerics_attention import one_document, packed, ring
from benchmarks.numerics_cases import Made, Setting, chunked_loss, compiled_blocks, fp8, lora, nf4

FP32, BF16 = torch.float32, torch.bfloat16
LIMITS = {FP32: 1e-5, BF16: 1e-2}
SECONDS = 40  # maximum duration of a case


@dataclass
class Case:
    make: Callable[[Setting], Made]
    dtypes: Sequence[torch.dtype] = (FP32, BF16)
    limits: dict[torch.dtype, float] = field(default_factory=lambda: LIMITS)


CASES: dict[str, Case] = {
    "loss, trained head": Case(chunked_loss()),
    "loss, head with bias": Case(chunked_loss(bias=True)),
    "loss, frozen head": Case(chunked_loss(frozen=True)),
    "loss, soft-capped": Case(chunked_loss(cap=5.0)),
    "attention, one document": Case(one_document),
    "attention, packed": Case(packed(None), [BF16]),
    "attention, packed, window": Case(packed(60), [BF16]),
    "attention, ring": Case(ring("one document")),
    "attention, ring, packed": Case(ring("packed")),
    "attention, ring, masked": Case(ring("masked")),
    "LoRA": Case(lora(widened=False)),
    "LoRA, widened": Case(lora(widened=True)),
    "NF4": Case(nf4),
    # rounding to e4m3 has a relative error of up to 1/16; tensorwise rounds gradients to e5m2, up to 1/8
    "fp8, tensorwise": Case(fp8("tensorwise"), [BF16], {BF16: 0.12}),
    "fp8, rowwise": Case(fp8("rowwise"), [BF16], {BF16: 0.06}),
    "fp8, rowwise_with_gw_hp": Case(fp8("rowwise_with_gw_hp"), [BF16], {BF16: 0.06}),
    "compiled blocks": Case(compiled_blocks()),
    "compiled blocks, fp8": Case(compiled_blocks(fp8=True), [BF16], {BF16: 0.12}),
    "compiled blocks, LoRA": Case(compiled_blocks(lora=True)),
    "compiled blocks, LoRA, fp8": Case(compiled_blocks(lora=True, fp8=True), [BF16], {BF16: 0.06}),
}


@dataclass
class Result:
    forward: float
    backward: float | None
    limit: float

    @property
    def ok(self) -> bool:
        return max(self.forward, self.backward or 0.0) <= self.limit  # False for NaN


def measure(name: str, dtype: torch.dtype, device: torch.device, seed: int) -> Result:
    """Run one case.

    Args:
        name: name of the case.
        dtype: dtype of the inputs.
        device: device to run on.
        seed: seed of the inputs.
    """
    case = CASES[name]
    setting = Setting(device, dtype, torch.Generator().manual_seed(seed))
    made = case.make(setting)
    out, wanted = made.ours(), made.theirs()
    backward = None
    if made.leaves:
        grad = torch.randn(wanted.shape, generator=setting.generator).to(device)
        ours = torch.autograd.grad(out, made.leaves, grad.to(out.dtype))
        theirs = torch.autograd.grad(wanted, made.references, grad.to(out.dtype).float())
        backward = error(torch.cat([g.flatten() for g in ours]), torch.cat([g.flatten() for g in theirs]))
    return Result(error(out, wanted), backward, case.limits[dtype])


def error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[""], help="parts of the names of the cases to run; all")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the inputs; the time")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    import automodel_trainer.modules  # noqa: F401  takes its time, which is no case's

    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, seed {args.seed}")
    print(f"{'path':<28}{'dtype':<10}{'forward':>10}{'backward':>10}{'limit':>9}  ok    seconds", flush=True)
    failed = 0
    for name in (name for name in CASES if any(part.lower() in name.lower() for part in args.cases)):
        for dtype in CASES[name].dtypes:
            began, label = time.perf_counter(), f"{name:<28}{str(dtype).removeprefix('torch.'):<10}"
            try:
                with within(SECONDS):
                    result = measure(name, dtype, device, args.seed)
            except Exception as problem:  # continue with the other cases
                failed += 1
                print(f"{label}{type(problem).__name__}: {str(problem)[:300]}", flush=True)
                continue
            failed += not result.ok
            backward = "-" if result.backward is None else f"{result.backward:.1e}"
            numbers = f"{result.forward:>10.1e}{backward:>10}{result.limit:>9.1e}"
            print(f"{label}{numbers}  {'yes' if result.ok else 'NO':<6}{time.perf_counter() - began:.1f}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
