"""Operations that the compiler takes as they are, and the name under which it keeps what it has compiled.

Torch keeps compiled code on disk for later runs. It tells one custom operation from another by name alone, although the
code holds what was traced of it: its gradient and its fake. So a run after an upgrade of this package, or of a library
with operations of its own, would compute the gradients of the version before.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from automodel_trainer.nn.installed import installed_versions

OPERATORS: dict[str, str] = {}
"""Maps the names of this project's operations to the files that define them, gradients and fakes included."""

LIBRARIES = (
    "transformers", "kernels", "torchao", "bitsandbytes", "liger-kernel", "transformer-engine-torch", "flash-attn",
    "flash-linear-attention", "causal-conv1d", "mamba-ssm",
)  # fmt: skip
"""Distributions whose operations a model may use."""


def operator(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.custom_op("automodel_trainer::" + name)`, noted for `key_by_operators`."""

    def register(function: Callable[..., Any]) -> Any:
        OPERATORS[name] = function.__code__.co_filename
        return torch.library.custom_op(f"automodel_trainer::{name}", function, mutates_args=mutates_args)

    return register


def key_by_operators() -> None:
    """Let code compiled from now on be kept under a name that tells these operations from other versions of them.

    Processes that compile kernels read it from the environment when they start. They choose the name under which torch
    keeps the fastest variant of a kernel, and a run with another name would measure all variants again.
    """
    tag, config = f"{hash_of(*sorted(set(OPERATORS.values())))}-{_libraries()}", torch.compiler.config
    if tag not in config.cache_key_tag:
        config.cache_key_tag = f"{config.cache_key_tag} {tag}".strip()
    os.environ["TORCH_COMPILE_CACHE_KEY_TAG"] = config.cache_key_tag


@cache
def hash_of(*files: str) -> str:
    """16 hexadecimal digits that another version of one of the files does not have."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]


def _libraries() -> str:
    """16 hexadecimal digits that other versions of the libraries do not have."""
    return hashlib.sha256(str(installed_versions(*LIBRARIES)).encode()).hexdigest()[:16]
