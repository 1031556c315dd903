"""Decoding steps of `generate` as recordings. Private names of transformers (5.23.0)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from automodel_trainer.nn.recorded_call import RecordedCall

_refused: WeakSet[PreTrainedModel] = WeakSet()  # a step was tried, and does what cannot be recorded
_EXTRAS = ("output_attentions", "output_hidden_states")


@contextmanager
def recorded_decoding(model: PreTrainedModel, make: Callable[..., RecordedCall] = RecordedCall) -> Iterator[None]:
    """A context in which forwards of one new token on a static cache are recorded, and then replayed.

    It is for models of which transformers says that a decoding step is the same operations at every token. All other
    calls of the forward run as they are.

    Args:
        model: its weights stay where they are until the end.
        make: what records calls.
    """
    before = vars(model).get("forward")
    original = model.forward
    recorded: RecordedCall | None = None
    of_cache: Any = None

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal recorded, of_cache
        cache = kwargs.get("past_key_values")
        if args or not _decodes(kwargs, cache):
            return original(*args, **kwargs)
        if recorded is None or cache is not of_cache:
            state = _plain_state(cache)
            recorded, of_cache = make(original, functools.partial(_tensors, cache)), cache
            outputs = recorded(**kwargs)
            recorded.given_up |= _plain_state(cache) != state  # it counts tokens in Python, which no replay would do
        else:
            outputs = recorded(**kwargs)
        if recorded.refused:
            _refused.add(model)
        return outputs

    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before  # type: ignore[method-assign]


def can_record(model: PreTrainedModel) -> bool:
    """Whether decoding steps of the model can be recorded, if the cache is static."""
    return bool(model._can_compile_fullgraph) and not model.config.is_encoder_decoder and model not in _refused


def _decodes(kwargs: dict[str, Any], cache: Any) -> bool:
    """Whether a forward computes one new token of each row on a static cache."""
    ids = kwargs.get("input_ids")
    return (
        isinstance(cache, Cache)
        and not isinstance(cache, DynamicCache)
        and bool(cache.is_compileable)
        and not cache.offloading
        and isinstance(ids, Tensor)
        and ids.shape[-1] == 1
        and not torch.is_grad_enabled()
        and not any(kwargs.get(extra) for extra in _EXTRAS)
    )


def _tensors(cache: Any) -> list[Tensor]:
    return [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]


def _plain_state(cache: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in vars(layer).items() if not isinstance(v, Tensor)} for layer in cache.layers]
