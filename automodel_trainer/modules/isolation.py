"""What is proved of an objective's model before training: see `models/isolation.py`. Proofs are kept on disk."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedConfig

from automodel_trainer.data.cache import cache_root
from automodel_trainer.models.isolation import Isolation, prove_isolation
from automodel_trainer.nn.installed import installed_versions
from automodel_trainer.strategies.base.objective import MicroBatch, Objective

FORMAT_VERSION = 2
"""Part of every key. Increase it when the proof changes."""
_PACKAGES = ("torch", "transformers", "causal-conv1d", "flash-linear-attention", "mamba-ssm", "kernels", "flash-attn")
_ON_CPU = ("eager", "sdpa")


def isolation_of(objective: Objective, config: PreTrainedConfig, attention: str, trust_remote_code: bool) -> Isolation:
    """What is proved of the model that `config` describes, on the inputs that the objective gives it.

    Every rank proves the same, or reads what another has written to `$AMT_CACHE`.

    Args:
        attention: the `kernels.attention` of the run. "auto" and this project's kernels are proved by `sdpa`, which
            has the same masks.
    """

    probe = copy.copy(objective)

    def inputs_of(micro_batch: MicroBatch, by_length: bool) -> dict[str, Any]:
        probe.gives_document_lengths = by_length
        inputs, _ = probe.split({"labels": torch.zeros_like(micro_batch["input_ids"]), **micro_batch})
        return inputs

    own = attention if attention in _ON_CPU else None

    def prove(device: str = "cpu", dtype: torch.dtype = torch.float32, named: str | None = own) -> Isolation:
        return prove_isolation(
            config,
            objective.auto_class,
            inputs_of,
            by_length=objective.takes_document_lengths,
            attention=named,
            trust_remote_code=trust_remote_code,
            device=device,
            dtype=dtype,
        )

    def best() -> Isolation:
        if torch.cuda.is_available() and attention.startswith(("flash_", "kernels-community")):
            return prove("cuda", torch.bfloat16, attention)
        found = prove()
        # The kernels of other libraries do not run on a CPU.
        if found.packed is None and torch.cuda.is_available():
            found = max(found, prove("cuda", torch.bfloat16), key=lambda proof: proof.packed is not None)
        return found

    if trust_remote_code:  # the code may change under the same config
        return best()
    described = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "name_or_path")}
    key = [type(objective).__qualname__, objective.auto_class, attention, torch.cuda.is_available(), described]
    return _kept(json.dumps(key, sort_keys=True, default=str), best)


_known: dict[str, Isolation] = {}


def _kept(described: str, prove: Callable[[], Isolation]) -> Isolation:
    key = hashlib.sha256(json.dumps([FORMAT_VERSION, installed_versions(*_PACKAGES), described]).encode()).hexdigest()[
        :32
    ]
    if key not in _known:
        try:
            _known[key] = _on_disk(cache_root() / "isolation" / f"{key}.json", prove)
        except OSError:  # a cache that cannot be written
            _known[key] = prove()
    return _known[key]


def _on_disk(path: Path, prove: Callable[[], Isolation]) -> Isolation:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_file():
            return Isolation(**json.loads(path.read_text()))
        found = prove()
        if found.checked:  # what could not be tried today may be tried tomorrow
            path.write_text(json.dumps(asdict(found)))
    return found


def packs(micro_batch: MicroBatch) -> bool:
    """Whether positions restart in a row of a micro-batch. Waits for the device if the micro-batch does not say."""
    positions = micro_batch.get("position_ids")
    if micro_batch.get("packed") is not None:
        return bool(micro_batch["packed"])
    if micro_batch.get("attention_mask") is not None:
        return False
    if not isinstance(positions, Tensor) or positions.ndim not in (2, 3):
        return False
    positions = positions if positions.ndim == 2 else positions[0]  # several for each token: the first ones count
    return bool((torch.diff(positions, dim=-1) != 1).any())
