"""Every use of a private name of transformers' masks (transformers 5.23.0): how documents reach them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

from automodel_trainer.models.record import record_of, recorded
from automodel_trainer.nn.documents import set_documents

MAKERS = (
    "create_causal_mask",
    "create_chunked_causal_mask",
    "create_masks_for_generate",
    "create_sliding_window_causal_mask",
)
"""Functions of `masking_utils` that models import and that take `position_ids`."""
_DOCUMENTS = "packed_sequence_mask_function.<locals>.inner_mask"
PLAIN = ("causal_mask_function", _DOCUMENTS, "sliding_window_overlay.<locals>.inner_mask")
"""What a mask of documents may be made of, for a kernel that knows causal attention, documents and one window."""
_JOINED = "and_masks.<locals>.and_mask"
_REMAPPED = "remap_positions_for_packed_sequence.<locals>.inner_mask"


@dataclass(frozen=True)
class PackingWithoutSync:
    """An entry of a model's record: `packing_without_sync` is installed."""


def packing_without_sync(model: PreTrainedModel) -> None:
    """Let `model` read document boundaries from `position_ids` without waiting for the device.

    In every forward transformers checks whether positions restart, and the answer comes from the device. Our callers
    know it: they pass `position_ids` only if positions restart. So while `model` runs, given positions always delimit
    documents, and without positions a row is one document.

    Some models take `position_ids` and do not pass them on when they build their masks. They get them here.
    """
    if recorded(model, PackingWithoutSync):
        return
    original = masking_utils.find_packed_sequence_indices
    makers = list(_makers(model))

    def enter(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        masking_utils.find_packed_sequence_indices = _one_document if positions is None else _document_indices
        if isinstance(positions, Tensor) and positions.ndim in (2, 3):
            positions = positions if positions.ndim == 2 else positions[0]  # several for a token: the first ones count
            for namespace, name, make in makers:
                namespace[name] = partial(_make_mask, make, positions)

    def leave(*_: object) -> None:
        masking_utils.find_packed_sequence_indices = original
        for namespace, name, make in makers:
            namespace[name] = make
        set_documents(None)

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave, always_call=True)
    record_of(model).keep(PackingWithoutSync())


def _makers(model: PreTrainedModel) -> Iterator[tuple[dict[str, Any], str, Callable[..., Any]]]:
    """Where the modeling code of `model` finds the functions that make masks: namespace, name, function."""
    classes = {cls for m in model.modules() if isinstance(m, PreTrainedModel) for cls in type(m).__mro__}
    for module in sorted({cls.__module__ for cls in classes if issubclass(cls, PreTrainedModel)}):
        namespace = vars(sys.modules[module])
        for name in MAKERS:
            if namespace.get(name) is getattr(masking_utils, name):
                yield namespace, name, namespace[name]


def _make_mask(make: Callable[..., Any], positions: Tensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("or_mask_function") is not None and kwargs.get("attention_mask") is None:
        # Transformers would ask such a function for places in a document, and it knows places in the row (the tokens of
        # one picture see each other). So documents are kept apart here, by places in the row.
        apart = masking_utils.packed_sequence_mask_function(_document_indices(positions))
        own = kwargs.get("and_mask_function")
        kwargs["and_mask_function"] = apart if own is None else masking_utils.and_masks(own, apart)
        kwargs["position_ids"] = None
        return make(*args, **kwargs)
    if len(args) < 5 and kwargs.get("position_ids") is None:  # the fifth argument
        kwargs["position_ids"] = positions
    return make(*args, **kwargs)


def _one_document(position_ids: Tensor) -> None:
    set_documents(None)


def _document_indices(position_ids: Tensor) -> Tensor:
    """The index of every token's document, int64 `[b, s]`, from positions `[b, s]` that restart at each document."""
    starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    numbers = starts.cumsum(-1)
    set_documents(numbers)
    return numbers


def is_plain(mask_function: Callable[..., Any]) -> bool:
    """Whether a mask function is causal attention within documents and perhaps a window, and nothing else."""
    parts = set(_parts(mask_function))
    return "causal_mask_function" in parts and parts <= set(PLAIN)


def keeps_documents_apart(mask_function: Callable[..., Any]) -> bool:
    """Whether a mask function knows documents, from positions that restart."""
    return _DOCUMENTS in _parts(mask_function)


def _parts(function: Callable[..., Any]) -> Iterator[str]:
    """The qualified names of the functions that a mask function is the intersection of."""
    name = getattr(function, "__qualname__", repr(function))
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if getattr(function, "__module__", None) != masking_utils.__name__:
        yield f"{getattr(function, '__module__', '')}.{name}"
    elif name == _JOINED:
        (functions,) = held
        for part in functions:
            yield from _parts(part)
    elif name == _REMAPPED:
        (inner,) = [value for value in held if callable(value) and not isinstance(value, Tensor)]
        yield from _parts(inner)
    else:
        yield name
