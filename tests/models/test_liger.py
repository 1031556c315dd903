"""Liger's kernels in a model's place, run by Triton's interpreter on the CPU; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from automodel_trainer.models.kernels import KernelsConfig, apply_kernels
from tests.beside import folder_of
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
        assert all(error < 1e-5 for error in found), (name, found)


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
