"""Attention over sequence shards, as a Hugging Face attention function: masks of the whole sequence, ulysses or ring.

`install_attention` registers, beside the kernel a model has, one that wraps it. While a micro-batch is split
(`exchanging`) it exchanges what attention needs; at any other time it is the kernel itself.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    and_masks,
    packed_sequence_compatibility_function,
    padding_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from automodel_trainer.models._transformers import attention_in_use
from automodel_trainer.nn.documents import set_documents
from automodel_trainer.strategies.context.ring_attention import ring_attention
from automodel_trainer.strategies.context.ulysses import ulysses_attention

CPAttention = Literal["auto", "ulysses", "ring"]
Method = Literal["ulysses", "ring"]
_PREFIX = "amt_cp_"
# Kinds of layers that mix tokens in the attention function alone. Others carry state along the sequence.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass
class Sequences:
    """The whole micro-batch as attention needs to know it; `s` is the padded length.

    Args:
        group: the ranks that hold shards of it.
        method: how attention is exchanged.
        order: int64 `[s]`, the global index of every token in rank-major order (rank 0's shard, rank 1's, …).
        position_ids: int64 `[b, s]`, in natural order.
        documents: int64 `[b, s]`, number of the packed document of every token; None where a row is one document.
        attention_mask: bool `[b, s]`, False where padded; None where nothing is.
    """

    group: Any
    method: Method
    order: Tensor
    position_ids: Tensor
    documents: Tensor | None
    attention_mask: Tensor | None

    @property
    def length(self) -> int:
        return self.order.numel()

    @cached_property
    def document_starts(self) -> list[list[int]] | None:
        """Where the documents of every row begin, for ring attention. Waits for the device, once in a micro-batch."""
        if self.documents is None:
            return None
        begins = F.pad(self.documents.diff(dim=1) != 0, (1, 0), value=True).cpu()
        return [row.nonzero().flatten().tolist() for row in begins]


# The micro-batch that is running. A plain global: on CUDA, backward recomputes in threads of its own.
_active: Sequences | None = None


@contextmanager
def exchanging(sequences: Sequences) -> Iterator[None]:
    """Forward and backward of one split micro-batch."""
    global _active
    previous, _active = _active, sequences
    try:
        yield
    finally:
        _active = previous


def check_method(method: str) -> None:
    """Raises ValueError for a name that is no method."""
    if method not in ("auto", "ulysses", "ring"):
        raise ValueError(f"cp_attention={method!r} is unknown. Allowed: auto, ulysses, ring.")


def install_attention(model: PreTrainedModel, size: int, tp: int = 1, method: CPAttention = "auto") -> Method:
    """Make `model` run attention over sequence shards while a micro-batch is split.

    Args:
        size: ranks of the cp group.
        tp: ranks that the heads are split over already.
        method: "auto" takes ulysses where heads divide, else ring.

    Returns:
        the method.

    Raises:
        ValueError: the model mixes tokens outside of attention, or its heads do not divide.
    """
    _refuse_unsplittable(model)
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads // tp
    if method == "ulysses" and heads % size:
        fits = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"cp_attention='ulysses' splits heads over cp={size} ranks, but each has {heads} of them (after tp={tp}). "
            f"Sizes that work: cp in {fits}; or cp_attention='ring', which needs no heads to divide."
        )
    inner = attention_in_use(model)
    if not inner.startswith(_PREFIX):
        _register(inner)
        keys = [key for key in model.config.sub_configs if getattr(model.config, key, None) is config]
        model.set_attn_implementation({"": _PREFIX + inner, **dict.fromkeys(keys, _PREFIX + inner)})
        if attention_in_use(model) == inner:
            raise ValueError(f"{type(model).__name__} does not call transformers' attention functions. Set cp=1.")
    return method if method != "auto" else ("ulysses" if heads % size == 0 else "ring")


def _register(inner: str) -> None:
    name = _PREFIX + inner
    AttentionInterface.register(name, partial(_attention, inner))
    if inner in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, partial(_mask, inner))


def _mask(inner: str, **arguments: Any) -> Any:
    if _active is None:
        return ALL_MASK_ATTENTION_FUNCTIONS[inner](**arguments)
    return _whole_mask(_active, inner, **arguments)


@torch.compiler.disable
def _attention(
    inner: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that models call: query `[b, h, s/cp, d]`, out `[b, s/cp, h, d]`."""
    kernel = _kernel(inner, module)
    if _active is None:
        return kernel(
            _Layer(module, inner, query.shape[1] // key.shape[1]), query, key, value, attention_mask, **kwargs
        )
    if _active.method == "ring":
        causal = kwargs.pop("is_causal", None)
        causal = getattr(module, "is_causal", True) if causal is None else causal
        starts = _active.document_starts if attention_mask is None and causal else None
        out = ring_attention(query, key, value, attention_mask, _active.group, causal=causal, starts=starts, **kwargs)
        return out, None
    kwargs["position_ids"] = _active.position_ids

    def attend(q: Tensor, k: Tensor, v: Tensor, **sinks: Any) -> Tensor:
        layer = _Layer(module, inner, q.shape[1] // k.shape[1])
        out: Tensor = kernel(layer, q, k, v, attention_mask, **kwargs, **sinks)[0]
        return out

    return ulysses_attention(query, key, value, attend, _active.group, sinks=kwargs.pop("s_aux", None)), None


def _kernel(inner: str, module: nn.Module) -> Callable[..., Any]:
    if inner != "eager":
        return ALL_ATTENTION_FUNCTIONS[inner]
    return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]


class _Layer:
    """An attention layer as its kernel shall see it: with this many queries per key head, under its own kernel's name.

    Splitting heads can change how many query heads share a key head, and kernels read both from the layer.
    """

    def __init__(self, module: nn.Module, inner: str, groups: int) -> None:
        self._module = module
        self.num_key_value_groups = groups
        self.config = _Named(module.config, inner) if hasattr(module, "config") else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Named:
    """A config that names another attention implementation."""

    def __init__(self, config: Any, inner: str) -> None:
        self._config = config
        self._attn_implementation = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _refuse_unsplittable(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{name} is no transformers model, so cp cannot replace its attention. Set cp=1.")
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds or any(isinstance(module, (nn.Conv1d, nn.RNNBase)) for module in model.modules()):
        what = f"layers of kind {', '.join(sorted(kinds))}" if kinds else "convolutions along the sequence"
        raise ValueError(f"{name} has {what}, which mix tokens outside of attention: it cannot be split over cp. cp=1.")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} takes no position_ids: a shard of its sequence would not know where it is. Set cp=1.")


def _whole_mask(sequences: Sequences, inner: str, mask_function: Callable[..., Any], **arguments: Any) -> Any:
    """What `inner`'s own mask would be over the whole sequence (ulysses), or this rank's rows of it (ring).

    `mask_function` is index based (causal, windows, chunks): it holds for the whole sequence as it does for a part.
    """
    arguments |= {"attention_mask": sequences.attention_mask, "q_offset": 0, "kv_offset": 0}
    if sequences.method == "ring" and _plainly_causal(sequences, **arguments):
        return None
    if sequences.documents is not None:
        mask_function = packed_sequence_compatibility_function(
            mask_function, sequences.position_ids, sequences.documents
        )
        arguments["allow_is_causal_skip"] = False
    if sequences.method == "ring":
        return _rows_of_mask(sequences, mask_function, **arguments)
    set_documents(sequences.documents)
    build = ALL_MASK_ATTENTION_FUNCTIONS[inner]
    lengths = {"q_length": sequences.length, "kv_length": sequences.length}
    return build(mask_function=mask_function, **{**arguments, **lengths})


def _plainly_causal(
    sequences: Sequences,
    *,
    attention_mask: Tensor | None,
    allow_is_causal_skip: bool = False,
    local_size: int | None = None,
    use_vmap: bool = False,
    **unused: Any,
) -> bool:
    """Whether a token sees all of its document that comes before it: ring attention needs no mask for that."""
    if use_vmap or not allow_is_causal_skip or (local_size is not None and local_size < sequences.length):
        return False
    # nobody who looks back sees what comes after the row's last token
    return attention_mask is None or bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def _rows_of_mask(
    sequences: Sequences,
    mask_function: Callable[..., Any],
    *,
    batch_size: int,
    attention_mask: Tensor | None,
    use_vmap: bool = False,
    **unused: Any,
) -> Tensor:
    """bool `[b, 1, s/cp, s]`, columns in rank-major order."""
    if use_vmap:
        raise ValueError(
            "This model adds a mask of its own to causal attention, which ring attention cannot split. "
            "Set cp_attention='ulysses'."
        )
    if attention_mask is not None:
        mask_function = and_masks(mask_function, padding_mask_function(attention_mask))
    columns = sequences.order
    rows = columns.view(dist.get_world_size(sequences.group), -1)[dist.get_rank(sequences.group)]
    batch = torch.arange(batch_size, device=columns.device)[:, None, None, None]
    head = torch.zeros(1, dtype=torch.long, device=columns.device)[None, :, None, None]
    mask = mask_function(batch, head, rows[None, None, :, None], columns[None, None, None, :])
    return mask.expand(batch_size, 1, len(rows), len(columns))
