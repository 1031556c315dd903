"""Checks that a layout computes the same as one device, for *this* model and *this* data.

A small model (same architecture, random weights of one seed) trains for three optimizer steps on the first batches of
the user's own data, with plain torch on one device and on the layout. Losses, module outputs, gradients and weights are
compared.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from automodel_trainer.models.shrink import shrink
from automodel_trainer.models.small_copy import small_copy
from automodel_trainer.modules import HuggingFaceModule
from automodel_trainer.strategies import MeshStrategy, StrategyRegistry
from automodel_trainer.verification.batches import first_steps, renumber
from automodel_trainer.verification.pictures import with_small_pictures
from automodel_trainer.verification.ranks import Launcher, Processes
from automodel_trainer.verification.report import Report, compile_report
from automodel_trainer.verification.steps import DRAWS, Job, layout_run, reference_run

STEPS = 3
ATTEMPTS = 3  # each with other random weights, as long as rounding decides a router's choice
ACCUMULATION = 2  # micro-batches per rank and step
LENGTH = 64  # tokens of a row: enough for attention windows, document boundaries and shard edges to occur


def verify(
    module: HuggingFaceModule,
    data: Any,
    strategy: Any = "fsdp2",
    devices: int | None = None,
    *,
    full: bool = False,
    length: int = LENGTH,
    launch: Launcher | None = None,
) -> Report:
    """Train a small copy of the model on one device and on a layout, and compare.

    Args:
        module: the objective; its model's config, loss, optimizer and adapters are used.
        data: a data module or an iterable of batches; the first batches are used.
        strategy: the layout, by name or as an object.
        devices: the number of ranks; None takes as few as the layout's sizes allow.
        full: run on this machine's GPUs instead of processes on the CPU.
        length: rows are cut to this many tokens. Rows with pictures are not cut; their pictures are made small.
        launch: starts the ranks; None starts processes on this machine.

    Raises:
        ValueError: the layout refuses this model, the data has no labels, or `full` needs more GPUs than there are.
    """
    began = time.monotonic()
    strategy = fresh(strategy)
    devices = devices or _fewest_devices(strategy)
    strategy.parallel_devices = [torch.device("cpu")] * devices
    strategy.connect(module)
    dims = strategy.choose_sizes()
    dims = dims.resolve(devices)
    if full and torch.cuda.device_count() < devices:
        raise ValueError(
            f"--full runs on {devices} GPUs, and this machine has {torch.cuda.device_count()}. Leave --full out to "
            "verify with processes on the CPU."
        )
    accumulation = max(ACCUMULATION, strategy.min_micro_batches)
    data = with_small_pictures(module, data)
    steps = first_steps(module, data, STEPS, accumulation * dims.dp_replicate * dims.dp_shard, length)
    config = copy.deepcopy(module.model_config)
    ep = devices if strategy.expert_ranks == "auto" else strategy.expert_ranks
    ranks = math.lcm(dims.cp * dims.tp, ep)
    small = _small(module, config, ranks, length, renumber(module, steps, config), strategy.min_layers)
    job = Job(
        module=module.without_model(),
        config=small,
        strategy=fresh(strategy),
        world_size=devices,
        steps=steps,
        device="cuda" if full else "cpu",
        attention=_attention(module.kernels.attention, full),
    )
    layout = dims.describe() + (f", ep {strategy.expert_ranks}" if ep > 1 else "")
    report = _attempts(job, launch or Processes(), f"{layout} on {devices} ranks", _describe(small))
    report.seconds = time.monotonic() - began
    return report


def _small(
    module: HuggingFaceModule, config: PreTrainedConfig, ranks: int, length: int, vocab_size: int, layers: int
) -> PreTrainedConfig:
    """The config of a small copy that runs; where none does, the runs below say why."""
    try:
        small: PreTrainedConfig = small_copy(
            config,
            module.auto_class,
            ranks=ranks,
            length=length,
            vocab_size=vocab_size,
            layers=layers,
            trust_remote_code=module.trust_remote_code,
        ).config
    except ValueError:
        return shrink(config, ranks, length, vocab_size, layers)
    return small


def _attempts(job: Job, launch: Launcher, layout: str, model: str) -> Report:
    """The report of the first decided attempt. An attempt is undecided if rounding decided a router's choice."""
    said: list[str] = []
    flipped = 0
    for attempt in range(ATTEMPTS):
        job = replace(job, strategy=fresh(job.strategy), seed=attempt * DRAWS)
        with tempfile.TemporaryDirectory() as folder:
            (reference,) = launch(1, reference_run, job, Path(folder))
            job.seed = reference.seed
            ranks = launch(job.world_size, layout_run, job, Path(folder))
        report = compile_report(layout, model, ranks, reference)
        said += report.findings
        flipped += report.flipped
        if not report.undecided:
            break
    report.findings, report.flipped, report.attempts = said, flipped, attempt + 1
    return report


def fresh(strategy: Any) -> MeshStrategy:
    """A copy of a strategy in the state before any Trainer used it.

    Args:
        strategy: a name or an object.

    Raises:
        ValueError: it is not a `MeshStrategy`.
    """
    strategy = StrategyRegistry.get(strategy) if isinstance(strategy, str) else copy.copy(strategy)
    if not isinstance(strategy, MeshStrategy):
        raise ValueError(
            f"{type(strategy).__name__} is not one of automodel_trainer's strategies, so it has no layout to verify. "
            "Give a name such as 'fsdp2', or a MeshStrategy."
        )
    strategy.forget_run()
    return strategy


def _fewest_devices(strategy: MeshStrategy) -> int:
    dims = strategy.requested_dims
    fixed = math.prod(size for name, size in vars(dims).items() if name != "dp_shard")
    if dims.dp_shard != -1:
        return fixed * dims.dp_shard
    inner, ep = dims.cp * dims.tp, strategy.expert_ranks
    shards = 1 if ep == "auto" else math.lcm(inner, ep) // inner  # the fewest that ep can borrow from
    return max(2, fixed * shards)


def _attention(name: str | None, full: bool) -> str | None:
    """The attention kernel to verify with. For one that the CPU does not have, `sdpa` computes the same."""
    if name in ("auto", "flex"):
        return None
    return name if full or name in ("eager", "sdpa") else "sdpa"


def _describe(config: PreTrainedConfig) -> str:
    text = config.get_text_config(decoder=True)
    name = (config.architectures or [config.model_type])[0]
    per_layer = getattr(text, "per_layer_attributes", None) or ()  # sizes that differ from layer to layer
    own = "all" if "num_key_value_heads" in per_layer else getattr(text, "num_key_value_heads", None) or "all"
    count = None if "num_attention_heads" in per_layer else getattr(text, "num_attention_heads", None)
    heads = f"{count} heads ({own} of keys)" if count else "no attention heads"
    kinds = getattr(text, "layer_types", None)
    layers = f"{text.num_hidden_layers} layers" + (f" ({', '.join(kinds)})" if kinds else "")
    return f"{name} made small: {layers}, width {text.hidden_size}, {heads}, {text.vocab_size} tokens"
