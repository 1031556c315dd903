"""`benchmarks/sampled.py`: where a program's time goes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.test_house import ROOT

PROGRAM = """
import sys, time
def slow(): time.sleep(0.6)
def outer(): slow(); time.sleep(0.3)
print(sys.argv[1:])
outer()
"""


def test_a_tree_of_calls(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    sampled = [sys.executable, str(ROOT / "benchmarks" / "sampled.py"), str(tmp_path / "tree")]
    command = [*sampled, "-m", "program", "--option"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "['--option']\n"
    first, second = (tmp_path / "tree").read_text().splitlines()
    assert first.endswith("program.py:outer")
    assert second.startswith("  ")
    assert second.endswith("program.py:slow")
    whole, part = float(first.split()[0]), float(second.split()[0])
    assert whole - part > 0.2
    assert part > 0.5
