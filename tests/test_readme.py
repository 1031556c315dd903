"""Every code block of the README runs, in a folder that holds what it names: `my-model` and `chats.jsonl`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.processes import amt, call, run_code
from tests.tiny import save_tiny_model, write_chats

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(YAML,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    save_tiny_model(folder / "my-model")
    write_chats(folder / "chats.jsonl", 200)
    (folder / "run.yaml").write_text(YAML)
    return folder


def test_python_blocks(home: Path) -> None:
    """In order, as a reader would."""
    assert len(PYTHON) == 5
    run_blocks(home)
    assert (home / "my-tuned-model" / "config.json").is_file()
    assert (home / "runs/python/checkpoints/latest").resolve().name == "step-00000006"


@pytest.mark.parametrize("command", COMMANDS, ids=[" ".join(line.split()[:2]) for line in COMMANDS])
def test_commands(command: str, home: Path) -> None:
    """After those before it, as a reader would."""
    run_blocks(home)
    for line in COMMANDS[: COMMANDS.index(command) + 1]:
        run(line, home)


@cache
def run_blocks(home: Path) -> None:
    """Run the Python blocks, once."""
    call(home, run_code, "\n".join(PYTHON), home / "readme.py")


@cache
def run(command: str, home: Path) -> None:
    """Run a command, once."""
    program, *arguments = shlex.split(command)
    if program == "amt":
        amt(*arguments, folder=home)
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [program, *arguments], cwd=home, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_the_two_commands_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
