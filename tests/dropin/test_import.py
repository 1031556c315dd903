"""`from automodel_trainer import AutoModelForCausalLM` imports what transformers' own class does, and nothing heavy."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from transformers import AutoModelForCausalLM as Theirs
before = set(sys.modules)
from automodel_trainer import AutoModel, AutoModelForCausalLM
assert issubclass(AutoModelForCausalLM, Theirs)
print(*sorted(set(sys.modules) - before))
"""


def test_the_classes_import_little() -> None:
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split()
    assert set(found) <= {"automodel_trainer", "automodel_trainer.auto"}, found
