"""Where a model's routers are, by what transformers records of them (transformers 5.23.0)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from automodel_trainer.nn.experts import CHOICES, COUNTS
from automodel_trainer.nn.mixing import mixed

_BIASES = ("e_score_correction_bias", "expert_bias")  # added to scores to choose experts, and not to their weights


class Routing(NamedTuple):
    """What a router computed in one forward.

    Attributes:
        logits: `[n, experts]`, of each token, before any bias.
        chosen: int64 `[n, k]`, the experts of each token; None: the router does not return them.
    """

    logits: Tensor
    chosen: Tensor | None


class RecordingRouter(nn.Module):
    """A router that keeps what it computes while `records` is true. Mixed in by `record_routing`."""

    logits_index: int
    records = False
    routing: Routing | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the router itself."""
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if self.records:
            self.routing = self.routing_of(output)
        return output

    def routing_of(self, output: Any) -> Routing:
        """What a forward of this router returned."""
        outputs = output if isinstance(output, tuple) else (output,)
        logits = outputs[self.logits_index]
        whole = (o for o in outputs if isinstance(o, Tensor) and not o.is_floating_point() and o.dtype != torch.bool)
        return Routing(logits.reshape(-1, logits.shape[-1]), next(whole, None))


class Router(NamedTuple):
    """A router of a model.

    Attributes:
        name: of the module in its model.
        module: records what it computes.
        block: the module that calls it, if that holds the bias and hands it over.
    """

    name: str
    module: RecordingRouter
    block: nn.Module | None = None

    @property
    def bias(self) -> Tensor | None:
        """`[experts]`, what the model adds to scores to choose experts; None: nothing."""
        named = (*self.module.named_buffers(), *self.module.named_parameters())
        own = next((tensor for name, tensor in named if name.rpartition(".")[2] in _BIASES), None)
        return own if own is not None or self.block is None else _bias_of_block(self.block)


def _bias_of_block(block: nn.Module) -> Tensor | None:
    held = {**block._buffers, **block._parameters}
    return next((held[name] for name in _BIASES if held.get(name) is not None), None)


def record_routing(model: nn.Module) -> list[Router]:
    """Make the routers of `model` able to record, in place, in its order. Empty if transformers records none of them.

    The model may be laid out already. Its blocks have not run yet if they are compiled.
    """
    found: dict[int, Router] = {}
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    for owner in model.modules():
        for recorder in _recorders(owner):
            for name, module in owner.named_modules():
                part = recorder.layer_name
                if not isinstance(module, recorder.target_class) or (part and f".{part}." not in f".{name}."):
                    continue
                if not isinstance(module, RecordingRouter):
                    module.__class__ = mixed(RecordingRouter, type(module))  # type: ignore[arg-type]
                    module.logits_index = recorder.index  # type: ignore[assignment]
                whole = names[id(module)]
                found[id(module)] = Router(whole, module, modules[whole.rpartition(".")[0]])  # type: ignore[arg-type]
    return [found[number] for number in names if number in found]


def _recorders(owner: nn.Module) -> Iterator[OutputRecorder]:
    if not isinstance(owner, PreTrainedModel):
        return
    recorded = (owner._can_record_outputs or {}).get("router_logits", [])
    for spec in recorded if isinstance(recorded, list) else [recorded]:
        if isinstance(spec, OutputRecorder) and spec.target_class is not None:
            yield spec
        elif isinstance(spec, type):
            yield OutputRecorder(spec, index=1)  # transformers' rule for a bare class


def expert_count(config: Any) -> int:
    """The number of experts of a layer that routers choose from, by the model's config; 0 if it names none."""
    return _first(config, COUNTS)


def choices_per_token(config: Any) -> int:
    """The number of experts that a token chooses, by the model's config; 0 if it names none."""
    return _first(config, CHOICES)


def _first(config: Any, names: Sequence[str]) -> int:
    text = config.get_text_config(decoder=True)
    return next((count for name in names if isinstance(count := getattr(text, name, None), int) and count), 0)


def configured_coefficient(config: Any) -> float:
    """The coefficient of the routers' balancing loss that transformers would add to the loss; 0: it adds none."""
    text = config.get_text_config(decoder=True)
    return float(getattr(text, "router_aux_loss_coef", None) or 0.0) if asks_for_logits(config) else 0.0


def asks_for_logits(config: Any) -> bool:
    """Whether a model of this config returns its routers' logits, and its balancing loss, by itself."""
    return any(getattr(part, "output_router_logits", False) for part in (config, config.get_text_config(decoder=True)))
