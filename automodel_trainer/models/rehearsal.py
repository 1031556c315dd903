"""Does a model that a layout cuts give the logits of the whole? Tried on a small copy, in one process.

Layouts rely on more than a signature tells: that a token's place comes from `position_ids`, that only attention mixes
tokens, that layers pass on nothing but hidden states. No list of families says where that holds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from automodel_trainer.models._transformers import attention_in_use
from automodel_trainer.models.auto_classes import auto_classes_of
from automodel_trainer.models.small_copy import TOKENS, ordinary_tokens, small_copy, text_inputs
from automodel_trainer.nn.text import first_line

Cut = Callable[[PreTrainedModel, Tensor], Tensor]
"""Runs a model as a layout would on ids `[b, s]`, and returns the logits `[b, s, v]`."""
Watching = Callable[[PreTrainedModel], AbstractContextManager[None]]
"""A context in which a copy runs."""
ROWS = 2
SEEDS = 2
"""Weights that are tried: a router may choose otherwise where two scores are equal but for rounding."""
TOLERANCE = 1e-3
"""Of the logits' spread. Rounding gives a hundredth of it, a mistake as much as the spread itself."""
_known: dict[tuple[str, type, str], str | None] = {}


def rehearse(
    model: PreTrainedModel,
    name: str,
    cut: Cut,
    watching: Watching | None = None,
) -> str | None:
    """What is wrong with a small copy of `model` that runs cut. None: nothing, or there is no copy to tell.

    Args:
        model: on meta or real; only its class and its config are read.
        name: of the way to cut.
        cut: runs the copy; it may change it.
        watching: a context in which the whole copy runs first. It is entered once for a name and a model.
    """
    key = (name, type(model), model.config.to_json_string())
    if key not in _known:
        with torch.device("cpu"):
            _known[key] = _rehearse(model, cut, watching)
    return _known[key]


def _rehearse(model: PreTrainedModel, cut: Cut, watching: Watching | None) -> str | None:
    auto_class = next(iter(auto_classes_of(model)), None)
    if auto_class is None:
        return None
    attention = attention_in_use(model)
    found: str | None = None
    for seed in range(SEEDS):
        try:
            copy = small_copy(
                model.config,
                auto_class,
                attention=attention if attention in ("eager", "sdpa") else None,
                seed=seed,
            )
            tokens = ordinary_tokens(copy.config)
            ids = tokens[torch.arange(ROWS * TOKENS).reshape(ROWS, -1) * 7 % len(tokens)]
            with watching(copy) if watching else nullcontext():
                whole = _logits(copy, ids)
        except Exception:  # a family's own code may fail anywhere on sizes that nobody has
            return None
        spread = float(whole.std())
        if whole.shape[:-1] != ids.shape or not 1e-6 < spread < 1e6:
            return None
        found = _difference(copy, ids, cut, whole, spread)
        if found is None:
            return None
    return found


@torch.no_grad()
def _difference(copy: PreTrainedModel, ids: Tensor, cut: Cut, whole: Tensor, spread: float) -> str | None:
    try:
        logits = cut(copy, ids)
    except Exception as error:
        return f"fails ({first_line(error)})"
    if logits.shape != whole.shape:
        return f"gives logits of shape {list(logits.shape)} for {list(whole.shape)}"
    apart = float((logits - whole).abs().nan_to_num(nan=torch.inf).max()) / spread
    return None if apart <= TOLERANCE else f"gives logits that are wrong by {apart:.2g} of their spread"


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return logits_of(model(**text_inputs(model, ids)))


def logits_of(output: object) -> Tensor:
    """The logits in a model's output."""
    logits: Tensor = output["logits"] if "logits" in output else output[0]  # type: ignore[index, operator]
    return logits.float()
