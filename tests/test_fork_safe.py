"""Imports leave CUDA alone, so that the ranks of a notebook can be forked. Here is no GPU: one is pretended."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from automodel_trainer import DDPStrategy
from automodel_trainer._lightning import NotebookLauncher

TORCHAO = """
import torch
from torch.utils._triton import has_triton
from . import kernels
capability = torch.cuda.get_device_capability
found = has_triton(), capability(), torch.cuda.get_device_capability() >= (10, 0)
"""

GPU = """
import torch
from torch.utils import _triton
asked = []
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = real = lambda device=None: asked.append("capability") or (8, 0)
_triton.has_triton = lambda: asked.append("triton") or True
"""

CHECKS = {
    "nvml": """
        import torchao, torchao.later
        assert torchao.found[1:] == ((9, 0), False), torchao.found
        assert torchao.later.capability == (9, 0)
        assert not asked, asked
        assert torch.cuda.get_device_capability is real
        assert (torchao.capability(), torchao.has_triton()) == ((8, 0), True), "torch answers after the import"
        assert asked == ["capability", "triton"]
        """,
    "no nvml": """
        _fork_safe._capability = lambda: None
        import torchao
        assert torchao.found == (True, (8, 0), False)
        """,
    "broken": """
        (folder / "later.py").write_text("import nothing_of_this_name")
        try:
            import torchao.later
        except ImportError:
            assert torch.cuda.get_device_capability is real
        else:
            raise AssertionError
        """,
}


@pytest.mark.parametrize("name", CHECKS)
def test_an_import_of_torchao(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "torchao"
    folder.mkdir()
    (folder / "__init__.py").write_text(TORCHAO)
    (folder / "kernels.py").write_text("import torch\nassert torch.cuda.get_device_capability()\n")
    (folder / "later.py").write_text("import torch\ncapability = torch.cuda.get_device_capability()\n")
    start = f"""
import pathlib
from automodel_trainer import _fork_safe
folder = pathlib.Path({str(folder)!r})
_fork_safe._capability = lambda: (9, 0)
"""
    code = GPU + start + textwrap.dedent(CHECKS[name])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_ranks_are_not_forked_after_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = DDPStrategy(launcher="fork")
    monkeypatch.setattr(DDPStrategy, "root_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="Restart the kernel"):
        NotebookLauncher(strategy, start_method="fork").launch(print)
