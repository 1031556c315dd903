"""`amt verify`: does a layout compute for *this* model and *this* data what one device computes?

The model is made small (same architecture, random weights of one seed), fed the first batches of the user's own data,
and trained for three optimizer steps: by plain torch on one device, and by the layout. Everything is compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from automodel_trainer.modules import CausalLMModule
from automodel_trainer.strategies import MeshStrategy, StrategyRegistry
from automodel_trainer.tools.verify_batches import first_steps, renumber
from automodel_trainer.tools.verify_ranks import Launcher, Processes
from automodel_trainer.tools.verify_report import Report, compile_report
from automodel_trainer.tools.verify_shrink import shrink
from automodel_trainer.tools.verify_steps import DRAWS, Job, layout_run, reference_run

if TYPE_CHECKING:
    from automodel_trainer.trainer import Trainer

STEPS = 3
ATTEMPTS = 3  # with other random weights each, while rounding decides what a router chooses
ACCUMULATION = 2  # micro-batches per rank and step
LENGTH = 64  # tokens of a row: every window, boundary and shard edge occurs in it
EXIT_CODES = (
    "Exit code: 0 the same numbers as one device; 1 other numbers; 3 undecided: at every attempt rounding decided what "
    "a router chose (2 is for arguments that are no such)."
)
_CONFIG_KEYS = ("seed_everything", "model", "data")


def verify(
    module: CausalLMModule,
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
        module: what is trained: its model's config, loss, optimizer and adapters.
        data: a data module or an iterable of batches; the first of them are used, cut to `length` tokens.
        strategy: the layout, by name or as an object.
        devices: ranks; None: as few as the layout's sizes allow.
        full: on this machine's GPUs instead of processes on the CPU.
        launch: starts the ranks; None: processes on this machine.

    Raises:
        ValueError: the layout refuses this model, or there is nothing to verify.
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
    accumulation = max(ACCUMULATION, strategy.least_micro_batches)
    steps = first_steps(data, STEPS, accumulation * dims.dp_replicate * dims.dp_shard, length)
    config = copy.deepcopy(config_of(module))
    small = shrink(config, dims.cp * dims.tp, length, renumber(steps, config), strategy.least_layers)
    job = Job(
        module=_without_model(module),
        config=small,
        strategy=fresh(strategy),
        world_size=devices,
        steps=steps,
        device="cuda" if full else "cpu",
        attention=_attention(module.kernels.attention, full),
    )
    report = _attempts(job, launch or Processes(), f"{dims.describe()} on {devices} ranks", _describe(small))
    report.seconds = time.monotonic() - began
    return report


def _attempts(job: Job, launch: Launcher, layout: str, model: str) -> Report:
    """The report of the first run that says something of the layout; where rounding decided a choice, it does not."""
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
    """A strategy as it was before a Trainer took it in hand.

    Raises:
        ValueError: not one of this project's.
    """
    strategy = StrategyRegistry.get(strategy) if isinstance(strategy, str) else copy.copy(strategy)
    if not isinstance(strategy, MeshStrategy):
        raise ValueError(f"{type(strategy).__name__} is none of automodel_trainer's strategies: it has no layout.")
    strategy.forget_run()
    return strategy


def config_of(module: CausalLMModule) -> PreTrainedConfig:
    """The config of the model that a module trains, its overrides applied."""
    (reference,) = module._reference
    if isinstance(reference, PreTrainedModel):
        return reference.config
    config = AutoConfig.from_pretrained(module.source or reference, trust_remote_code=module.trust_remote_code)
    for name, value in module.config_overrides.items():
        setattr(config, name, value)
    return config


def _fewest_devices(strategy: MeshStrategy) -> int:
    dims = strategy.requested_dims
    fixed = math.prod(size for name, size in vars(dims).items() if name != "dp_shard")
    return fixed * dims.dp_shard if dims.dp_shard != -1 else max(2, fixed)


def _without_model(module: CausalLMModule) -> CausalLMModule:
    """The objective alone, light enough to send to other processes."""
    light = copy.copy(module)
    light._modules = {**module._modules, "model": None}
    light._reference = ("",)
    light._tokenizer = None
    light._trainer = None
    light.__dict__.pop("tokenizer", None)
    return light


def _attention(name: str | None, full: bool) -> str | None:
    """A kernel that the CPU does not have is stood in for by one that computes the same."""
    if name in ("auto", "flex"):
        return None
    return name if full or name in ("eager", "sdpa") else "sdpa"


def _describe(config: PreTrainedConfig) -> str:
    text = config.get_text_config(decoder=True)
    name = (config.architectures or [config.model_type])[0]
    heads = f"{text.num_attention_heads} heads ({getattr(text, 'num_key_value_heads', None) or 'all'} of keys)"
    kinds = getattr(text, "layer_types", None)
    layers = f"{text.num_hidden_layers} layers" + (f" ({', '.join(kinds)})" if kinds else "")
    return f"{name} made small: {layers}, width {text.hidden_size}, {heads}, {text.vocab_size} tokens"


# --- command line -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
    """`amt verify`: exits with 0 when the numbers are the same, with 1 when not, and with 3 when that stays open."""
    parser = argparse.ArgumentParser(prog="amt verify", description=__doc__, epilog=EXIT_CODES)
    parser.add_argument(
        "--config", help="a run's YAML: its model and data, and its strategy unless --strategy is given"
    )
    parser.add_argument("--model", help="a model folder or Hub id, in place of --config")
    parser.add_argument("--data", help="a data set, with --model")
    parser.add_argument("--strategy", help="the layout, for example fsdp2_tp:tp=2 or fsdp2:cp=2")
    parser.add_argument("--devices", type=int, help="ranks; default: as few as the layout's sizes allow")
    parser.add_argument("--seq-len", type=int, default=LENGTH, help=f"tokens of a row (default {LENGTH})")
    parser.add_argument("--full", action="store_true", help="run on this machine's GPUs, not on the CPU")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(list(argv))
    module, data, strategy = _from_arguments(args)
    launch = None if args.full else Processes("fork")  # nothing has run backward here: ranks start at once
    report = verify(module, data, strategy, args.devices, full=args.full, length=args.seq_len, launch=launch)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        report.print()
    raise SystemExit(report.exit_code)


def _from_arguments(args: argparse.Namespace) -> tuple[CausalLMModule, Any, Any]:
    if bool(args.config) == bool(args.model):
        raise ValueError("Give amt verify --config run.yaml, or --model and --data.")
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "") if args.full else ""
    if args.config:
        trainer, module, data = _from_yaml(Path(args.config))
        strategy = args.strategy or trainer.strategy
    else:
        if not args.data:
            raise ValueError("amt verify --model also needs --data.")
        from automodel_trainer.data.adapt import as_datamodule

        module, (datamodule, loader) = CausalLMModule(args.model), as_datamodule(args.data)
        data, strategy = datamodule or loader, args.strategy or "fsdp2"
    if not isinstance(module, CausalLMModule):
        raise ValueError(f"amt verify knows CausalLMModule and its subclasses, not {type(module).__name__}.")
    return module, with_tokenizer(data, module), strategy


def with_tokenizer(data: Any, module: CausalLMModule) -> Any:
    """A data module without a tokenizer takes the model's, as in `fit`."""
    if getattr(data, "tokenizer", 0) is None:
        data.tokenizer = module.tokenizer
    return data


def _from_yaml(path: Path) -> tuple[Trainer, Any, Any]:
    """Trainer (for its strategy), module and data that a run's configuration describes."""
    from automodel_trainer.lightning_cli import build

    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file.")
    config = yaml.safe_load(path.read_text())
    run = {key: config[key] for key in _CONFIG_KEYS if key in config}
    strategy = (config.get("trainer") or {}).get("strategy", "auto")
    run["trainer"] = {"strategy": strategy, "accelerator": "cpu", "devices": 1, "logger": False}
    return build(run)
