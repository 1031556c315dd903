"""Liger's kernels in a model's place, run by Triton's interpreter on the CPU; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd import Function

from automodel_trainer.models.kernels import KernelsConfig, apply_kernels
from automodel_trainer.models.kernels.libraries._liger import LIGER
from automodel_trainer.models.kernels.mlp import swap_gated_mlps
from automodel_trainer.models.kernels.norm import swap_norms
from automodel_trainer.models.kernels.rope import restore_rope, swap_rope
from automodel_trainer.strategies.base.compile import compile_blocks
from tests.beside import folder_of
from tests.limits import SAFETY, check_step, check_within, roundoff
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]


def test_the_same_numbers() -> None:
    """Every kernel forward and backward, at odd sizes, with ignored labels and rows; and small models made of them."""
    if not all(folder_of(name).is_dir() for name in ("triton", "liger_kernel")):
        pytest.skip("needs triton and liger_kernel beside the environment (`make venv`)")
    command = [sys.executable, "-m", "tests.models.liger_on_cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 14
    for name, found in errors.items():
        for error in found:
            check_within(name, error, SAFETY * roundoff(64), "of sums over the 61 rows or the 64 numbers of a row")


class Normed(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounding: str, in_place: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).flatten(0, -2).sum(0), None, None, None, None


class Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gate * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return grad * up, grad * gate


class Rotated(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q * 2, k * 2

    @staticmethod
    def backward(ctx: Any, q: Tensor, k: Tensor) -> Any:
        return q * 2, k * 2, None, None


def test_the_compiler_looks_into_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block with all of them is one graph, and the same one for every layer."""
    ops = SimpleNamespace(LigerRMSNormFunction=Normed, LigerSiLUMulFunction=Gated, LigerRopeFunction=Rotated)
    ops.LigerLayerNormFunction = ops.LigerGELUMulFunction = None
    monkeypatch.setattr(LIGER, "load", lambda: ops)
    ids, steps = torch.randint(5, 260, (2, 16)), []
    for compiled in (False, True):
        model = tiny_model("qwen3", num_hidden_layers=3).train()
        swap_norms(model, LIGER.norm)
        swap_gated_mlps(model, LIGER.activation)
        swap_rope(model, LIGER.rope(), torch.device("cpu"))
        if compiled:
            torch._dynamo.reset()
            counters.clear()
            compile_blocks(model, "aot_eager")
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        steps.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    restore_rope(model)
    check_step(steps[1], steps[0], 32)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    gpu = torch.device("cuda")
    for part in ("norm", "activation", "rope", "loss"):
        with pytest.raises(ValueError, match=rf"{part}='liger' needs a GPU, and this run is on cpu"):
            apply_kernels(tiny_model("llama"), KernelsConfig(**{part: "liger"}), torch.device("cpu"))
        with pytest.raises(ValueError, match=r"='liger' needs .*: pip install 'automodel-trainer\[liger\]'"):
            apply_kernels(tiny_model("llama"), KernelsConfig(**{part: "liger"}), gpu)
        with pytest.raises(ValueError, match=rf"kernels {part}='ligr' is unknown\. Allowed: auto, "):
            KernelsConfig(**{part: "ligr"})
