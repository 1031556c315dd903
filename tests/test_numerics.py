"""Every fast path that a CPU can run against plain arithmetic in fp32: the cases of `benchmarks/numerics.py`."""

from __future__ import annotations

import secrets

import pytest
import torch

from benchmarks.numerics import CASES, measure
from tests.beside import use


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes])
def test_close_to_the_reference(name: str, dtype: torch.dtype) -> None:
    if "fp8" in name or "NF4" in name:
        use("torchao")
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    result = measure(name, dtype, torch.device("cpu"), seed)
    assert result.ok, result
    assert result.backward is not None or "attention, packed" in name


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge of a ring's blocks that forgets to weigh them is seen, forward and backward."""
    from automodel_trainer.strategies.context import ring_attention

    def add(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
        out.add_(part)
        lse.copy_(torch.logaddexp(lse, part_lse))

    monkeypatch.setattr(ring_attention, "merge", add)
    result = measure("attention, ring", torch.float32, torch.device("cpu"), 0)
    assert not result.ok
    assert result.forward > 0.1
