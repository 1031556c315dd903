"""Attention over sequence shards as a Hugging Face attention function, by ulysses or ring.

`install_attention` registers a wrapper around the model's attention kernel, next to the kernel. While a micro-batch is
split (`exchanging`), the wrapper exchanges data between ranks and builds masks for the whole sequence. Otherwise it
just calls the kernel.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
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

from automodel_trainer.models._transformers import attention_in_use, has_tower
from automodel_trainer.nn.documents import set_documents
from automodel_trainer.strategies.context.ring_attention import ring_attention
from automodel_trainer.strategies.context.ulysses import stacked_attention, ulysses_attention

CPAttention = Literal["auto", "ulysses", "ring"]
Method = Literal["ulysses", "ring"]
_PREFIX = "amt_cp_"
# Kinds of layers that mix tokens only in the attention function. Others carry state along the sequence.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass
class Sequences:
    """What attention needs to know about the whole micro-batch; `s` is the padded length.

    Args:
        group: the ranks that hold its shards; None: this process holds all, one after another along the batch.
        method: how attention communicates.
        order: int64 `[s]`, the global index of every token in rank-major order (rank 0's shard, rank 1's, …).
        position_ids: int64 `[b, s]`, in natural order.
        documents: int64 `[b, s]`, the index of every token's packed document; None if each row is one document.
        attention_mask: bool `[b, s]`, False for padding; None if there is none.
        cut: takes this rank's tokens of a tensor whose dimension `dim` is `s`, after the one of rows: `cut(tensor,
            dim)`. None: the model's inputs are cut already; otherwise its decoder's are (`at_decoder.py`).
    """

    group: Any
    method: Method
    order: Tensor
    position_ids: Tensor
    documents: Tensor | None
    attention_mask: Tensor | None
    cut: Callable[[Tensor, int], Tensor] | None = None

    @property
    def length(self) -> int:
        """The padded length `s`."""
        return self.order.numel()

    @cached_property
    def document_starts(self) -> list[list[int]] | None:
        """The start indices of the documents of every row, for ring attention; None if each row is one document.

        This is a host/device sync, once per micro-batch.
        """
        if self.documents is None:
            return None
        begins = F.pad(self.documents.diff(dim=1) != 0, (1, 0), value=True).cpu()
        return [row.nonzero().flatten().tolist() for row in begins]


# The micro-batch that is running. A plain global, not a context variable: CUDA backwards recompute in other threads.
_active: Sequences | None = None


@contextmanager
def exchanging(sequences: Sequences) -> Iterator[None]:
    """A context around forward and backward of one split micro-batch, in which attention exchanges data."""
    global _active
    previous, _active = _active, sequences
    try:
        yield
    finally:
        _active = previous


def running() -> Sequences | None:
    """The micro-batch that is split at the moment."""
    return _active


def check_method(method: str) -> None:
    """Check the name of a method.

    Raises:
        ValueError: it is unknown.
    """
    if method not in ("auto", "ulysses", "ring"):
        raise ValueError(f"cp_attention={method!r} is unknown. Allowed: auto, ulysses, ring.")


def install_attention(model: PreTrainedModel, size: int, tp: int = 1, method: CPAttention = "auto") -> Method:
    """Make `model` run attention over sequence shards while a micro-batch is split.

    Args:
        size: number of cp ranks.
        tp: number of ranks that the heads are split over already.
        method: "auto" takes ulysses if `size` divides the heads, else ring.

    Returns:
        the chosen method.

    Raises:
        ValueError: the model mixes tokens outside of attention, does not use transformers' attention functions, or has
            a number of heads that ulysses cannot split.
    """
    refuse_unsplittable(model)
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads // tp
    if method == "ulysses" and heads % size:
        fits = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"cp_attention='ulysses' splits heads over cp={size} ranks, but there are {heads} heads (after tp={tp}). "
            f"Allowed: cp in {fits}; or cp_attention='ring', which works for any number of heads."
        )
    replace_attention(model)
    return method if method != "auto" else ("ulysses" if heads % size == 0 else "ring")


def replace_attention(model: PreTrainedModel) -> None:
    """Put the wrapper around the attention function of `model`.

    Raises:
        ValueError: the model does not use transformers' attention functions.
    """
    inner = attention_in_use(model)
    if not inner.startswith(_PREFIX):
        _register(inner)
        # A composite model keeps the implementation in its text config too.
        config = model.config.get_text_config(decoder=True)
        keys = [key for key in model.config.sub_configs if getattr(model.config, key, None) is config]
        model.set_attn_implementation({"": _PREFIX + inner, **dict.fromkeys(keys, _PREFIX + inner)})
        if attention_in_use(model) == inner:
            raise ValueError(
                f"cp > 1 replaces transformers' attention function, and {type(model).__name__} does not call it. "
                "Set cp=1."
            )


def _register(inner: str) -> None:
    """Register the wrappers of the kernel `inner` and of its mask function with transformers."""
    name = _PREFIX + inner
    AttentionInterface.register(name, partial(_attention, inner))
    if inner in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, partial(_mask, inner))


def _mask(inner: str, **arguments: Any) -> Any:
    """The mask function that models call."""
    if _active is None:
        return ALL_MASK_ATTENTION_FUNCTIONS[inner](**arguments)
    return _whole_mask(_active, inner, **arguments)


@torch.compiler.disable  # exchanges between ranks stay out of the graph
def _attention(
    inner: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that models call.

    Args:
        query: `[b, h, s/cp, d]`.
        key, value: `[b, h_kv, s/cp, d]`.
        attention_mask: what `_mask` returned.

    Returns:
        out `[b, s/cp, h, d]`, and None for the attention weights.
    """
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
        return out.contiguous(), None  # models view it, as they do what transformers' own kernels return
    kwargs["position_ids"] = _active.position_ids

    all_sinks = kwargs.pop("s_aux", None)
    own = [n for n, p in module.named_parameters(recurse=False) if p is all_sinks]  # the eager kernel reads it there

    def attend(q: Tensor, k: Tensor, v: Tensor, **sinks: Any) -> Tensor:
        layer = _Layer(module, inner, q.shape[1] // k.shape[1], dict.fromkeys(own, sinks.get("s_aux")))
        out: Tensor = kernel(layer, q, k, v, attention_mask, **kwargs, **sinks)[0]
        return out

    if _active.group is None:
        return stacked_attention(query, key, value, attend, _active.order, sinks=all_sinks), None
    return ulysses_attention(query, key, value, attend, _active.group, sinks=all_sinks), None


def _kernel(inner: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function of that name. "eager" is not registered: each modeling file has its own."""
    if inner != "eager":
        return ALL_ATTENTION_FUNCTIONS[inner]
    return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]


class _Layer:
    """An attention layer as its kernel should see it.

    Kernels read two things from the layer that context parallel changes: the number of query heads per key head, which
    splitting heads can change, and the name of the attention implementation.
    """

    def __init__(self, module: nn.Module, inner: str, groups: int, parts: Mapping[str, Any] = {}) -> None:
        self._module = module
        self.num_key_value_groups = groups
        self.config = _Named(module.config, inner) if hasattr(module, "config") else None
        vars(self).update(parts)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._module)  # a kernel may look for its modeling file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Named:
    """A config that names another attention implementation."""

    def __init__(self, config: Any, inner: str) -> None:
        self._config = config
        self._attn_implementation = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def refuse_unsplittable(model: nn.Module) -> None:
    """Raise for models whose sequence cannot be split over cp ranks."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{name} is not a transformers model, so cp > 1 cannot replace its attention. Set cp=1.")
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    decoder = model.get_decoder() if has_tower(model) else model
    if kinds or any(isinstance(module, (nn.Conv1d, nn.RNNBase)) for module in decoder.modules()):
        what = f"layers of kind {', '.join(sorted(kinds))}" if kinds else "convolutions along the sequence"
        raise ValueError(
            f"{name} has {what}, which mix tokens outside of attention, so cp > 1 cannot split its sequences. Set cp=1."
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{name} takes no position_ids, so with cp > 1 a shard would not know its place in the sequence. Set cp=1."
        )


def _whole_mask(sequences: Sequences, inner: str, mask_function: Callable[..., Any], **arguments: Any) -> Any:
    """Build the mask of the kernel `inner` for the whole sequence (ulysses), or this rank's rows of it (ring).

    `mask_function` is index based (causal, windows, chunks), so it is valid for the whole sequence as for a part.

    Args:
        arguments: those that transformers gives to the mask function.
    """
    # transformers gave the arguments for a shard
    arguments |= {"attention_mask": sequences.attention_mask, "q_offset": 0, "kv_offset": 0}
    if sequences.method == "ring" and _plainly_causal(sequences, **arguments):
        return None
    if sequences.documents is not None:  # tokens see only their own document
        mask_function = packed_sequence_compatibility_function(
            mask_function, sequences.position_ids, sequences.documents
        )
        arguments["allow_is_causal_skip"] = False
    if sequences.method == "ring":
        return _rows_of_mask(sequences, mask_function, **arguments)
    set_documents(sequences.documents)  # the model's own call saw a shard's positions only
    build = ALL_MASK_ATTENTION_FUNCTIONS[inner]
    lengths = {"q_length": sequences.length, "kv_length": sequences.length}
    lengths |= {"batch_size": len(sequences.position_ids)} if "batch_size" in arguments else {}
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
    """Whether every token sees all earlier tokens of its document. Ring attention needs no mask for that."""
    if use_vmap or not allow_is_causal_skip or (local_size is not None and local_size < sequences.length):
        return False
    # Padding at the end of a row needs no mask: causal attention never looks at it.
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
    """This rank's rows of the mask: bool `[b, 1, s/cp, s]`, columns in rank-major order."""
    if use_vmap:
        raise ValueError(
            "This model adds its own mask to causal attention, which cp_attention='ring' cannot split. Set "
            "cp_attention='ulysses', or cp=1."
        )
    if attention_mask is not None:
        mask_function = and_masks(mask_function, padding_mask_function(attention_mask))
    columns = sequences.order
    rows = columns.view(dist.get_world_size(sequences.group), -1)[dist.get_rank(sequences.group)]
    batch = torch.arange(batch_size, device=columns.device)[:, None, None, None]
    head = torch.zeros(1, dtype=torch.long, device=columns.device)[None, :, None, None]
    mask = mask_function(batch, head, rows[None, None, :, None], columns[None, None, None, :])
    return mask.expand(batch_size, 1, len(rows), len(columns))
