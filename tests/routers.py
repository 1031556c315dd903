"""Routers that choose by a margin. Between experts in a near tie rounding chooses, which layouts do not share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from automodel_trainer.verification.choices import ChoiceRecorder, Margin
from tests.tiny import tiny_model

Model = TypeVar("Model", bound=nn.Module)
MARGIN = 1e-4  # of the largest score: a hundred times what rounding does to it


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that choose, by name."""
    recorder = ChoiceRecorder(model)
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    recorder.stop()
    return {call.module: model.get_submodule(call.module) for call in recorder.take()}


def separated(model: Model, seed: int = 4) -> Model:
    """Draw the weights of a model's routers anew, eight times as large. The seed is one that leaves no near tie."""
    generator = torch.Generator().manual_seed(seed)
    for router in routers_of(model).values():
        for parameter in router.parameters():
            parameter.data.normal_(std=0.15, generator=generator)
    return model


def routed_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model whose experts, if it has any, are chosen clearly."""
    return separated(tiny_model(family, **overrides))


@contextmanager
def decided(model: nn.Module, margin: float = MARGIN) -> Iterator[None]:
    """All choices of the model's forward passes in here are clear.

    Raises:
        AssertionError: one is not, and another machine might choose otherwise.
    """
    recorder, found = ChoiceRecorder(model), Margin()
    yield
    recorder.stop()
    found.add(recorder.take())
    assert found.smallest >= margin, (
        f"choose other weights: the smallest gap is {found.smallest:.1e} of the scores, in {found.module}; "
        f"{margin:.0e} is wanted"
    )
