"""Run one pipeline stage of a Hugging Face model by the model's own forward.

While a stage runs, all other modules are swapped for stand-ins. Those for earlier layers return the hidden states that
arrived; those for later layers store the ones that leave. So every stage lets the model's own code make masks, rotary
embeddings and the pattern of layer kinds, from the micro-batch, which every stage has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from automodel_trainer.models._transformers import has_tower
from automodel_trainer.strategies.pipeline.split import Split, Stage, first_argument


class _Arriving(nn.Module):
    """Stands in for a layer before the stage: returns the hidden states `[b, s, h]` that the previous stage sent."""

    def __init__(self, hidden: Tensor | None) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.hidden


class _Leaving(nn.Module):
    """Stands in for a layer after the stage: stores its input, which is the stage's output."""

    hidden: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.hidden = first_argument(args, kwargs)
        return self.hidden


class _Empty(nn.Module):
    """Stands in for an embedding: hidden states `[b, s, h]` that nothing reads. Some models scale them in place.

    Args:
        width: h.
        weight: an empty tensor: some models ask an embedding or a head for the dtype or device of its weight.
    """

    def __init__(self, width: int, weight: Tensor) -> None:
        super().__init__()
        self.width, self.weight = width, weight

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(*ids.shape, self.width, dtype=self.weight.dtype, device=ids.device)


class _Pass(nn.Module):
    """Stands in for a norm or head of another stage: returns its input. See `_Empty` for `weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return first_argument(args, kwargs)


def _is_pixels(value: Any) -> bool:
    """Whether an input is pictures: numbers, not the ids, places or masks of tokens."""
    if isinstance(value, list | tuple):
        return any(map(_is_pixels, value))
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass
class Turn:
    """One stage's forward on one micro-batch.

    Args:
        stage: the stage.
        hidden: hidden states `[b, s, h]` from the previous stage; None for the first stage.
    """

    stage: Stage
    hidden: Tensor | None = None


class SplitModel:
    """Runs the stages of a model that `split_model` has cut. It replaces the model's forward.

    Args:
        model: the model.
        split: what this rank holds of it.
        dtype: dtype of the hidden states.
        whole: runs the whole pipeline. It is called with the keyword arguments of a forward outside of any stage's
            turn.
    """

    def __init__(
        self, model: nn.Module, split: Split, dtype: torch.dtype, whole: Callable[[dict[str, Any]], Any]
    ) -> None:
        config: Any = model.config
        self.width: int = config.get_text_config(decoder=True).hidden_size
        self.split, self.dtype, self.model = split, dtype, model
        self._turn: Turn | None = None
        self._original = model.forward
        model.forward = self._dispatcher(whole)
        if split.holds_first and has_tower(model):
            model.get_decoder().register_forward_pre_hook(self._check_features, with_kwargs=True)  # type: ignore[operator]

    def _check_features(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Features of pictures that several layers take must find all these layers on the first stage."""
        layers = len(self.split.stages[0].layers)
        for name, value in kwargs.items():
            if isinstance(value, list) and len(value) > layers:
                raise ValueError(
                    f"pp > 1: the first {len(value)} layers of {type(self.model).__name__} take features of pictures "
                    f"({name}), and the first stage has {layers}. Set split to give it at least {len(value)}, or use "
                    "fsdp2, tp or cp."
                )

    def _dispatcher(self, whole: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
        @wraps(self._original)  # `generate` inspects the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._turn is not None:
                return self._run(self._turn, kwargs)
            return whole(kwargs | ({"input_ids": args[0]} if args else {}))

        return forward

    def run(self, turn: Turn, call: Callable[[], Any]) -> Any:
        """Run `call` while the model acts as one stage.

        Args:
            turn: the stage, and the hidden states that arrived.
            call: calls the model once and returns its output.

        Returns:
            hidden states `[b, s, h]`, or for the last stage the model's own output.
        """
        self._turn = turn
        try:
            return call()
        finally:
            self._turn = None

    def run_inside(self, turn: Turn, inputs: dict[str, Any]) -> Any:
        """Run a stage from inside a call of the model, whose hooks have run already. Returns the same as `run`.

        Args:
            turn: the stage, and the hidden states that arrived.
            inputs: keyword arguments of the model's forward.
        """
        return self._run(turn, inputs)

    def _run(self, turn: Turn, inputs: dict[str, Any]) -> Any:
        leaving = _Leaving()
        if not turn.stage.first:  # the tower is on the first stage; what places tokens is left: grids, kinds of tokens
            inputs = {name: value for name, value in inputs.items() if not _is_pixels(value)}
        with self._exchanged(turn, leaving):
            output = self._original(**inputs)
        if turn.stage.last:
            return output
        return self._checked(leaving.hidden)

    def _checked(self, hidden: Any) -> Tensor:
        """Check that hidden states have the shape and dtype that the next stage expects: it would receive garbage."""
        kind = type(self.model).__name__
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[-1] != self.width:
            what = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(
                f"pp > 1 sends one tensor of hidden states [b, s, {self.width}] between stages, and the layers of "
                f"{kind} pass on {what}. Use fsdp2, or tp."
            )
        if hidden.dtype != self.dtype:
            raise ValueError(
                f"pp > 1: the layers of {kind} pass on {hidden.dtype}, and this precision computes in {self.dtype}. "
                "Set precision='fp32' or 'bf16-true', or use fsdp2."
            )
        return hidden

    @contextmanager
    def _exchanged(self, turn: Turn, leaving: _Leaving) -> Iterator[None]:
        """Swap the modules of other stages for stand-ins, and back."""
        undo: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for path, module in self._replacements(turn, leaving):
                parent, _, key = path.rpartition(".")
                modules = self.model.get_submodule(parent)._modules
                undo.append((modules, key, modules[key]))
                modules[key] = module
            yield
        finally:
            for modules, key, module in undo:
                modules[key] = module

    def _replacements(self, turn: Turn, leaving: _Leaving) -> Iterator[tuple[str, nn.Module]]:
        """The modules to swap for a stage, by name, with their stand-ins."""
        parts, stage = self.split.parts, turn.stage
        arriving = _Arriving(turn.hidden)
        weight = torch.empty(0, dtype=self.dtype, device=next(self.model.parameters()).device)
        for index in range(self.split.stages[-1].layers.stop):  # all layers of the model
            if index not in stage.layers:
                yield f"{parts.layers}.{index}", arriving if index < stage.layers.start else leaving
        if not stage.first:
            for name in parts.before:
                if not (stage.last and name in parts.after):  # a module can be on both sides of the layers
                    yield name, _Empty(self.width, weight) if name in self.split.tables else _Pass(weight)
        if not stage.last:
            for name in parts.after:
                if not (stage.first and name in parts.before):
                    yield name, _Pass(weight)

    def parameters_of(self, stage: Stage) -> Iterator[nn.Parameter]:
        """The parameters that a stage uses at the moment, each once. FSDP2 swaps them when it gathers."""
        parts = self.split.parts
        names = [f"{parts.layers}.{i}" for i in stage.layers]
        names += [*(parts.before if stage.first else ()), *(parts.after if stage.last else ())]
        found = [p for name in names for p in self.model.get_submodule(name).parameters()]
        found += [self.model.get_parameter(name) for name in (parts.loose if stage.first else ())]
        seen: set[int] = set()
        for parameter in found:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
