"""docs/own_loop.md and the loop of the README: on one process, on two ranks, and the tests that the page names."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from tests.limits import check_run
from tests.pool import RankPool
from tests.processes import call, run_code
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_loop.md").read_text()
LOOP = next(
    b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) if "start()" in b
)


def run(code: str, folder: Path) -> None:
    os.chdir(folder)
    exec(code, {})


def one_device(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the README's loop does, in plain torch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "my-model", dtype=dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    for rows in torch.randint(6, 200, (2, 4, 16)):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_readmes_loop_on_two_ranks(pool: RankPool, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "my-model")
    pool.run(2, run, LOOP, tmp_path)
    saved = load_file(tmp_path / "my-own-model" / "model.safetensors")
    check_run(saved, one_device(tmp_path, torch.float64), one_device(tmp_path, torch.float32), 64)


def test_the_page(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "my-model")
    call(tmp_path, run_code, "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), tmp_path / "page.py")
    assert (tmp_path / "my-own-model" / "model.safetensors").is_file()
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in tests, name
