"""Optimizer and schedule as configuration: a run chooses them before its parameters exist and are sharded."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from automodel_trainer.models.lora import learning_rate_of
from automodel_trainer.modules._sharded_adam import on_shards
from automodel_trainer.nn._torch import without_graph_cache
from automodel_trainer.nn.schedule import PlannedLR


@dataclass
class OptimizerConfig:
    """An optimizer by class path.

    Args:
        name: a `torch.optim` class (`AdamW`) or any class path (`torch.optim.SGD`, `my_package.Lion`).
        weight_decay: applies to matrices and embeddings, not to norms and biases (fewer than 2 dimensions, or a
            name that ends in `bias`, as stacked biases of experts have).
        args: other arguments of the class (betas, eps, momentum, fused, …).
    """

    name: str = "torch.optim.AdamW"
    weight_decay: float = 0.01
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class SchedulerConfig:
    """A learning-rate schedule over optimizer steps.

    Args:
        name: `cosine`, `linear` (to `min_lr_ratio`), `constant`, or `wsd` (warm-up, stable, linear decay at the end).
        warmup_steps: steps of linear warm-up from 0.
        warmup_ratio: warm-up as a share of all steps; give one of the two.
        min_lr_ratio: the final learning rate as a share of the peak.
        decay_ratio: the share of steps after warm-up over which `wsd` decays.
    """

    name: str = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    min_lr_ratio: float = 0.0
    decay_ratio: float = 0.1


def build_optimizer(
    config: OptimizerConfig | str | Callable[[list[dict[str, Any]]], Optimizer],
    model: nn.Module,
    lr: float,
    lr_of: Callable[[str], float] | None = None,
) -> Optimizer:
    """The optimizer over the trainable parameters of `model`.

    Args:
        config: a configuration, a class path, or a callable that takes parameter groups.
        model: laid out; the optimizer updates this rank's shards.
        lr: the peak learning rate.
        lr_of: that of a parameter by its name; None: `lr` for all.

    Raises:
        ValueError: nothing is trainable, the optimizer cannot be imported, or it does not take an argument.
    """
    if callable(config):
        return compiled_apart(config(parameter_groups(model, None, lr, lr_of)))
    if isinstance(config, str):
        config = OptimizerConfig(name=config)
    cls = _import_optimizer(config.name)
    accepted = inspect.signature(cls).parameters
    unknown = [key for key in config.args if key not in accepted]
    if unknown:
        hint = difflib.get_close_matches(unknown[0], list(accepted), n=1)
        raise ValueError(
            f"optimizer {config.name} does not take {unknown}.{f' Did you mean {hint[0]!r}?' if hint else ''} "
            f"Allowed: {', '.join(k for k in accepted if k != 'params')}."
        )
    args = dict(config.args)
    groups = parameter_groups(model, config.weight_decay if "weight_decay" in accepted else None, lr, lr_of)
    if "fused" in accepted and not {"fused", "foreach"} & args.keys():
        args["fused"] = True
    if any(isinstance(p, DTensor) for group in groups for p in group["params"]):
        cls = on_shards(cls)
    return compiled_apart(cls(groups, lr=lr, **args))  # type: ignore[call-arg]


def check_lr(lr: object) -> None:
    """Check a learning rate before anything is built.

    Raises:
        ValueError: it is no number from 0 on.
    """
    if isinstance(lr, bool) or not isinstance(lr, Real | Tensor):
        raise ValueError(f"lr={lr!r} is a {type(lr).__name__}, and a learning rate is a number, such as 2e-5.")
    if not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr={lr} is no learning rate. Allowed: finite numbers from 0 on.")


def check_clip(norm: float | None) -> None:
    """Check the largest gradient norm. Clipping to a negative one would turn gradients around.

    Raises:
        ValueError: it is no number from 0 on.
    """
    if norm is not None and not norm >= 0:
        raise ValueError(f"gradient_clip_val={norm} is no norm. Allowed: numbers from 0 on; 0 does not clip.")


def compiled_apart(optimizer: Optimizer) -> Optimizer:
    """Turn off torch's graph cache during a step of torchao's optimizers on sharded parameters.

    These optimizers compile their step, and the cache mixes up the graphs of sharded 8-bit and 4-bit state
    (`without_graph_cache`).
    """
    sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    if sharded and type(optimizer).__module__.startswith("torchao."):
        scope = ExitStack()
        optimizer.register_step_pre_hook(lambda *_: scope.enter_context(without_graph_cache()) and None)
        optimizer.register_step_post_hook(lambda *_: scope.close())
    return optimizer


def parameter_groups(
    model: nn.Module, weight_decay: float | None, lr: float, lr_of: Callable[[str], float] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups: with and without weight decay, one for each learning rate that LoRA asks for.

    DTensors and plain tensors get separate groups, because a fused optimizer kernel takes only one kind.

    Args:
        model: its trainable parameters are grouped.
        weight_decay: of the parameters that `decays` is true for; None leaves it out of the groups.
        lr: the peak learning rate, from which LoRA's are derived.
        lr_of: that of a parameter by its name; None: `lr` for all.

    Raises:
        ValueError: no parameter is trainable.
    """
    groups: dict[tuple[bool, bool, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (
                decays(name, parameter),
                isinstance(parameter, DTensor),
                learning_rate_of(model, name, lr_of(name) if lr_of else lr),
            )
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ValueError("No parameter of the model is trainable: nothing to optimize. Set requires_grad on some.")
    built: list[dict[str, Any]] = []
    for (is_decayed, _, own_lr), params in groups.items():
        group: dict[str, Any] = {"params": params}
        if weight_decay is not None:
            group["weight_decay"] = weight_decay if is_decayed else 0.0
        if own_lr != lr:
            group["lr"] = own_lr
        built.append(group)
    return built


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and embeddings. Biases may be stacked, a row for each expert."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def build_scheduler(config: SchedulerConfig | str, optimizer: Optimizer, total_steps: int | None) -> PlannedLR:
    """The learning-rate schedule over `total_steps` optimizer steps.

    Args:
        config: a configuration, or the name of a schedule.
        optimizer: whose learning rates it sets.
        total_steps: of the run; None if unknown, as for a stream without max_steps.

    Raises:
        ValueError: the name is unknown, two warm-ups are given, the warm-up is not shorter than the run, or the
            schedule needs `total_steps` and it is None.
    """
    if isinstance(config, str):
        config = SchedulerConfig(name=config)
    _check(config, total_steps)
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * (total_steps or 0))
    shape = _SHAPES[config.name]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup  # the first step is not 0, so that it trains
        if total_steps is None:
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape(progress, config)

    return PlannedLR(optimizer, factor)


def _cosine(progress: float, config: SchedulerConfig) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float, config: SchedulerConfig) -> float:
    return 1 - progress


def _constant(progress: float, config: SchedulerConfig) -> float:
    return 1.0


def _wsd(progress: float, config: SchedulerConfig) -> float:
    return min(1.0, (1 - progress) / config.decay_ratio)


_SHAPES: dict[str, Callable[[float, SchedulerConfig], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
}


def _check(config: SchedulerConfig, total_steps: int | None) -> None:
    if config.name not in _SHAPES:
        raise ValueError(f"scheduler {config.name!r} is unknown. Allowed: {', '.join(_SHAPES)}.")
    if not 0 <= config.min_lr_ratio <= 1 or not 0 < config.decay_ratio <= 1:
        raise ValueError(f"{config}: min_lr_ratio must be in [0, 1] and decay_ratio in (0, 1].")
    if config.warmup_steps and config.warmup_ratio:
        raise ValueError("Give warmup_steps or warmup_ratio, not both.")
    if not 0 <= config.warmup_ratio < 1 or config.warmup_steps < 0:
        raise ValueError(f"{config} has an invalid warm-up: give warmup_steps ≥ 0 or a warmup_ratio in [0, 1).")
    if total_steps is None and (config.name != "constant" or config.warmup_ratio):
        raise ValueError(
            f"scheduler {config.name!r} needs the number of steps of the run. Set Trainer(max_steps=…), or use "
            "'constant' with warmup_steps."
        )
    if total_steps is not None and total_steps < 1:
        raise ValueError(
            "the run has no steps to train. Look at max_steps, max_epochs, limit_train_batches and the data."
        )
    if total_steps is not None and config.warmup_steps >= total_steps:
        raise ValueError(
            f"warmup_steps={config.warmup_steps} must be less than the run's {total_steps} step(s): give fewer."
        )


def _import_optimizer(name: str) -> type[Optimizer]:
    module_name, _, class_name = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name or "torch.optim"), class_name)
    except (ImportError, AttributeError) as error:
        known = [n for n in dir(torch.optim) if inspect.isclass(getattr(torch.optim, n)) and n != "Optimizer"]
        hint = difflib.get_close_matches(class_name, known, n=1)
        raise ValueError(
            f"optimizer {name!r} cannot be imported.{f' Did you mean {hint[0]!r}?' if hint else ''} "
            f"Allowed: {', '.join(known)}, or any class path."
        ) from error
    return cls


def parameters_of(optimizer: Any) -> list[Tensor]:
    """The trainable parameters of an optimizer. Walking the model's modules instead would cost time in every step."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad]


def trainable(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that require a gradient."""
    return [parameter for parameter in parameters if parameter.requires_grad]
