"""Runs the same optimizer steps on one device and on a layout, and measures how far apart they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins import Precision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel

from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.models.build import build_random
from automodel_trainer.models.stage_names import held_elsewhere
from automodel_trainer.modules import HuggingFaceModule
from automodel_trainer.modules.optim import build_optimizer, trainable
from automodel_trainer.strategies import MeshStrategy
from automodel_trainer.strategies.base.objective import count_all
from automodel_trainer.verification.choices import Choice, ChoiceRecorder, Margin, rounding
from automodel_trainer.verification.errors import (
    KeptTensors,
    common_scale,
    gradient_errors,
    kept_tensors,
    relative_error,
    scalar_error,
    weight_errors,
)
from automodel_trainer.verification.flips import Comparer, Flips, load_choices, save_choices
from automodel_trainer.verification.outputs import OutputRecorder, whole_output

LR = 3e-3  # large enough that a few steps move the weights; otherwise comparing them would show nothing
# Adam's smallest ε here. With a smaller one, Adam turns gradients that are mostly rounding into full steps.
EPS = 1e-3
# How often new weights are drawn, until every choice has a margin that rounding cannot bridge.
DRAWS = 4


@dataclass
class Job:
    """What both runs are given.

    Args:
        module: the objective, without a model.
        config: of the small model.
        strategy: the layout, before any process started.
        world_size: the number of ranks of the layout.
        steps: the micro-batches of every optimizer step, of all ranks.
        device: "cpu" or "cuda".
        attention: the attention kernel; None lets transformers choose.
        seed: of the random weights.
    """

    module: HuggingFaceModule
    config: PreTrainedConfig
    strategy: MeshStrategy
    world_size: int
    steps: list[list[dict[str, Any]]]
    device: str = "cpu"
    attention: str | None = None
    seed: int = 0


@dataclass
class Reference:
    """What the layout's run needs to know of the run on one device.

    Args:
        seed: of the weights that it used.
        margin: of its choices.
        limit: rounding may decide a choice with a gap up to this.
    """

    seed: int
    margin: Margin
    limit: float


@dataclass
class Comparison:
    """One rank's relative errors.

    Args:
        loss, norm: of every step.
        gradients: of every step, by parameter name.
        weights: after the last step, by parameter name.
        outputs: of the first micro-batch, by module name, in forward order.
        scale: c, if all gradients of the first step are c times those of one device; else None.
        flips: choices that one device made differently.
    """

    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    gradients: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    scale: float | None = None
    """What all gradients of the first step are a multiple of those of one device by, if they are."""
    flips: Flips = field(default_factory=Flips)


def reference_run(job: Job, folder: Path) -> Reference:
    """Train on one device with plain torch. Writes the results to `folder/reference.safetensors`.

    If a choice (of experts) is so close that rounding may decide it, the run is repeated with the weights of the next
    seed, at most `DRAWS` times in all. The run with the widest margin is kept.
    """
    limit = rounding(job.config.get_text_config(decoder=True).hidden_size)
    best: Reference | None = None
    for seed in range(job.seed, job.seed + DRAWS):
        kept, margin = _reference_steps(replace(job, seed=seed))
        if best is None or margin.smallest > best.margin.smallest:
            best = Reference(seed, margin, limit)
            save_file({key: t.cpu().contiguous() for key, t in kept.items()}, folder / "reference.safetensors")
        if margin.smallest > limit:
            break
    assert best is not None
    return best


def _reference_steps(job: Job) -> tuple[dict[str, Tensor], Margin]:
    device = torch.device(job.device)
    module = copy.copy(job.module)
    model = _build(job, None, device)
    object.__setattr__(module, "model", None)
    module.model = model
    optimizer = _optimizer(module, model)
    recorder = OutputRecorder(model, forwards=len(job.steps[0]))
    choices, margin = ChoiceRecorder(model), Margin()
    kept: dict[str, Tensor] = {}
    for step, micro_batches in enumerate(job.steps):
        tokens = count_all(module, micro_batches)
        losses = []
        for index, micro_batch in enumerate(micro_batches):
            losses.append(_backward(module, model, _to(micro_batch, device), tokens))
            calls = choices.take()
            margin.add(calls)
            kept |= save_choices(calls, step, index)
            if not margin.choices:
                choices.stop()  # a dense model makes no choices: stop watching it
        kept[f"loss/{step}"] = torch.stack(losses).double().sum() / tokens
        kept |= {f"gradient/{step}/{name}": grad.clone() for name, grad in _gradients(model)}
        kept[f"norm/{step}"] = nn.utils.clip_grad_norm_(trainable(model.parameters()), module.gradient_clip_val or 1e9)
        optimizer.step()
        optimizer.zero_grad()
    kept |= {f"weight/{name}": p.detach() for name, p in model.named_parameters()}
    for index, outputs in enumerate(recorder.outputs):
        kept |= {f"output/{index}/{order:05d}/{name}": t for order, (name, t) in enumerate(outputs.items())}
    return kept, margin


def layout_run(job: Job, folder: Path) -> Comparison:
    """Train on the layout, and compare this rank's results with the reference in `folder`. Collective."""
    module, strategy = copy.copy(job.module), job.strategy
    _start(strategy, module, job)
    model = module.model = _build(job, strategy, strategy.root_device)
    strategy.layout(module)
    optimizer = _optimizer(module, model)
    recorder = OutputRecorder(model)
    result = Comparison()
    with kept_tensors(folder) as reference:
        choosing = {name.split("/")[4] for name in reference.names if name.startswith("choice/")}
        # Watching would put breaks into the graphs of compiled blocks, and those must run as they do in training.
        choices = ChoiceRecorder(model, choosing) if choosing and not strategy.compiles else None
        comparer = Comparer(job.steps, strategy)
        for step, micro_batches in enumerate(job.steps):
            mine = [_to(m, strategy.root_device) for m in micro_batches[strategy.dp_rank :: strategy.dp_size]]
            tokens = strategy.sum_over_rows(count_all(module, mine))
            loss = strategy.forward_backward(module, mine, tokens).double()
            if choices is not None:
                comparer.compare(step, choices.take(), _choices_of(reference, step, strategy, len(micro_batches)))
            result.loss.append(scalar_error(strategy.sum_over_tokens(loss) / tokens, reference[f"loss/{step}"]))
            parameters = trainable(model.parameters())
            norm = strategy.clip_grad_norm_(parameters, None)
            result.norm.append(scalar_error(norm, reference[f"norm/{step}"]))
            gradients = {name: _full(grad) for name, grad in _gradients(model)}
            expected = _held(model, reference.below(f"gradient/{step}/"))
            result.gradients.append(gradient_errors(gradients, expected, float(reference[f"norm/{step}"])))
            if step == 0:
                result.scale = common_scale(gradients, expected)
            strategy.clip_grad_norm_(parameters, module.gradient_clip_val)
            optimizer.step()
            optimizer.zero_grad()
        weights = {name: _full(p.detach()) for name, p in model.named_parameters()}
        result.weights = weight_errors(weights, _held(model, reference.below("weight/")), LR)
        result.outputs = _compare_outputs(recorder.outputs[0], reference, strategy)
        result.flips = comparer.found
    return result


# --- building ---------------------------------------------------------------------------------------------------------


def _build(job: Job, strategy: MeshStrategy | None, device: torch.device) -> PreTrainedModel:
    lora = job.module.lora
    if lora is not None:
        lora = replace(lora, dropout=0.0, quantize=None, adapter=None)
    model = build_random(
        job.module.auto_class,
        copy.deepcopy(job.config),
        strategy,
        dtype=torch.float32,
        attn_implementation=job.attention,
        trust_remote_code=job.module.trust_remote_code,
        seed=job.seed,
        strict=False,
        lora=lora,
        device=device,
        freeze=job.module.frozen,
    )
    packing_without_sync(model)  # some models make their masks without position_ids; a run gives them to all
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # a head may have dropout that no field of the config names
    return model.train()


def _start(strategy: MeshStrategy, module: HuggingFaceModule, job: Job) -> None:
    """Set the strategy up as a Trainer does before it builds the model."""
    cuda = job.device == "cuda"
    plugin = Precision()
    plugin.precision = "32-true"
    strategy.parallel_devices = [
        torch.device("cuda", i) if cuda else torch.device("cpu") for i in range(job.world_size)
    ]
    strategy.cluster_environment = TorchElasticEnvironment()
    strategy.accelerator = CUDAAccelerator() if cuda else CPUAccelerator()
    strategy.precision_plugin = plugin
    strategy.connect(module)
    if cuda:
        torch.cuda.set_device(strategy.root_device)
    strategy.setup_environment()


def _optimizer(module: HuggingFaceModule, model: nn.Module) -> Optimizer:
    optimizer = build_optimizer(module.optimizer_config, model, LR)
    for group in optimizer.param_groups:
        if isinstance(group.get("eps"), float):
            group["eps"] = max(group["eps"], EPS)
    return optimizer


# --- running ----------------------------------------------------------------------------------------------------------


def _backward(module: HuggingFaceModule, model: nn.Module, micro_batch: dict[str, Any], tokens: Any) -> Tensor:
    inputs, targets = module.split(micro_batch)
    loss = module.loss(model(**inputs), targets)
    (loss / tokens).backward()
    return loss.detach()


def _held(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of this rank's parameters. In a pipeline, the other stages hold the others."""
    elsewhere = held_elsewhere(model, tensors)
    return {name: tensor for name, tensor in tensors.items() if name not in elsewhere}


def _to(micro_batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: v.to(device) if isinstance(v, Tensor) else v for key, v in micro_batch.items()}


def _gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)


def _full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


# --- comparing --------------------------------------------------------------------------------------------------------


def _choices_of(reference: KeptTensors, step: int, strategy: MeshStrategy, count: int) -> dict[int, list[Choice]]:
    """One device's choices for this rank's micro-batches of a step, by the number of the micro-batch."""
    mine = range(strategy.dp_rank, count, strategy.dp_size)
    return {number: load_choices(reference.below(f"choice/{step}/{number}/")) for number in mine}


def _compare_outputs(outputs: dict[str, Tensor], reference: KeptTensors, strategy: MeshStrategy) -> dict[str, float]:
    """Errors of module outputs in this rank's first micro-batch, in forward order, where parts can be joined."""
    errors = {}
    for key, expected in reference.below(f"output/{strategy.dp_rank}/").items():
        name = key.partition("/")[2]
        whole = whole_output(outputs[name], expected.shape, strategy) if name in outputs else None
        if whole is not None:
            errors[name] = relative_error(whole.cpu(), expected)
    return errors
