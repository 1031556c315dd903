"""`from automodel_trainer import AutoModelForCausalLM` imports what transformers' own class does, and nothing heavy.

Parts do not import the Trainer, and libraries of kernels are imported once they are chosen. All of it in one process
that has imported nothing yet.
"""

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
from automodel_trainer import add_lora, chunked_loss, clip_grad_norm_, encode_chat
from automodel_trainer import load_checkpoint, pack, save_checkpoint, stream_weights, weight_info
assert "automodel_trainer.trainer" not in sys.modules
assert not any(name.startswith("automodel_trainer.callbacks") for name in sys.modules)
from automodel_trainer.models.kernels import KernelsConfig, registry
KernelsConfig(norm="liger", linear="te")
registry.libraries()
assert not {"liger_kernel", "transformer_engine", "torchao"} & sys.modules.keys()
"""


def test_classes_and_parts_import_little() -> None:
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split()
    files = ("_fork_safe", "auto", "imports")
    assert set(found) <= {"automodel_trainer", *(f"automodel_trainer.{file}" for file in files)}, found
