"""Context parallel: the sequence of every micro-batch split over ranks, with balanced causal work.

A rank takes two of the 2·cp equal chunks of the sequence, r and 2·cp−1−r, so that the early chunk with little to attend
to and the late one with much add up to the same work everywhere. Positions and (already shifted) targets go along. All
of a transformer but attention works on its own tokens; attention is exchanged by a Hugging Face attention function
that `install` puts in the model's config, so no model code changes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    and_masks,
    find_packed_sequence_indices,
    packed_sequence_compatibility_function,
    padding_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from automodel_trainer.models._transformers import attention_in_use
from automodel_trainer.strategies.ring_attention import ring_attention
from automodel_trainer.strategies.ulysses import ulysses_attention

CPAttention = Literal["auto", "ulysses", "ring"]
_PREFIX = "amt_cp_"
# Kinds of layers that mix tokens in the attention function alone. Others carry state along the sequence.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
IGNORE_INDEX = -100


@dataclass
class Sequences:
    """The whole micro-batch as attention needs to know it; `s` is the padded length.

    Args:
        order: int64 `[s]`, the global index of every token in rank-major order (rank 0's shard, rank 1's, …).
        position_ids: int64 `[b, s]`, in natural order.
        documents: int64 `[b, s]`, number of the packed document of every token; None where a row is one document.
        attention_mask: bool `[b, s]`, False where padded; None where nothing is.
    """

    order: Tensor
    position_ids: Tensor
    documents: Tensor | None
    attention_mask: Tensor | None

    @property
    def length(self) -> int:
        return self.order.numel()


class ContextParallel:
    """One cp group: splits micro-batches, and runs attention over the shards.

    Args:
        mesh: the 1-D mesh that sequences are split over.
        method: "ulysses" turns sequence shards into head shards (any mask, any kernel; heads must divide), "ring" sends
            keys and values around.
        multiple_of: a shard's length is a multiple of this (what splits the sequence further needs it).
    """

    def __init__(self, mesh: DeviceMesh, method: Literal["ulysses", "ring"] = "ulysses", multiple_of: int = 1) -> None:
        self.group = mesh.get_group()
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.method = method
        self.multiple_of = 2 * self.size * multiple_of
        self.sequences: Sequences | None = None

    # --- splitting --------------------------------------------------------------------------------------------------

    @contextmanager
    def split(self, inputs: dict[str, Any], targets: Any) -> Iterator[tuple[dict[str, Any], Any]]:
        """This rank's part of a micro-batch. The context covers forward and backward (which may recompute attention).

        Args:
            inputs: of the model's forward: `input_ids` `[b, s]`, with or without `position_ids` and `attention_mask`.
            targets: tensors `[b, s]` aligned with the logits (shifted already, so that no label at a shard's edge is
                lost), in any nesting; other tensors are left as they are.

        Raises:
            ValueError: an input that there is no rule to split by.
        """
        global _active
        rows, length = inputs["input_ids"].shape
        _refuse_unknown(inputs, rows, length)
        inputs, self.sequences = self._prepare(inputs, rows, length)
        parts = {key: self.shard(v) if isinstance(v, Tensor) else v for key, v in inputs.items()}
        targets = tree_map(
            lambda t: (
                self.shard(self._pad(t, IGNORE_INDEX)) if isinstance(t, Tensor) and t.shape == (rows, length) else t
            ),
            targets,
        )
        previous, _active = _active, self
        try:
            yield parts, targets
        finally:
            _active, self.sequences = previous, None

    def _prepare(self, inputs: dict[str, Any], rows: int, length: int) -> tuple[dict[str, Any], Sequences]:
        inputs = dict(inputs)
        device = inputs["input_ids"].device
        positions = inputs.get("position_ids")
        packed = positions is not None and inputs.get("attention_mask") is None
        if positions is None:
            positions = torch.arange(length, device=device)[None]
        positions = _pad_positions(positions.expand(rows, -1), self.padded(length), restart=packed)
        mask = inputs.get("attention_mask")
        whole = None if mask is None else self._pad(mask, 0).bool()
        documents = find_packed_sequence_indices(positions) if packed else None
        # A mask of ones tells transformers not to look for documents in a shard's positions: they jump between chunks.
        local_mask = whole.to(mask.dtype) if whole is not None else torch.ones_like(positions)
        inputs["input_ids"] = self._pad(inputs["input_ids"], 0)
        inputs["position_ids"], inputs["attention_mask"] = positions, local_mask
        order = torch.cat([self._indices(rank, self.padded(length), device) for rank in range(self.size)])
        return inputs, Sequences(order, positions, documents, whole)

    def padded(self, length: int) -> int:
        """The length that a sequence of `length` tokens is padded to."""
        return -(-length // self.multiple_of) * self.multiple_of

    def _pad(self, tensor: Tensor, value: int) -> Tensor:
        return F.pad(tensor, (0, self.padded(tensor.shape[1]) - tensor.shape[1]), value=value)

    def shard(self, tensor: Tensor) -> Tensor:
        """This rank's two chunks of `[b, s, …]`; `s` must be padded."""
        chunks = tensor.chunk(2 * self.size, dim=1)
        return torch.cat([chunks[self.rank], chunks[2 * self.size - 1 - self.rank]], dim=1)

    def gather(self, tensor: Tensor, length: int) -> Tensor:
        """The whole `[b, length, …]`, in natural order, of the ranks' shards. Collective; gradients do not flow."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        first, second = zip(*(part.chunk(2, dim=1) for part in parts))
        return torch.cat([*first, *second[::-1]], dim=1)[:, :length]

    def _indices(self, rank: int, length: int, device: torch.device) -> Tensor:
        chunks = torch.arange(length, device=device).chunk(2 * self.size)
        return torch.cat([chunks[rank], chunks[2 * self.size - 1 - rank]])

    # --- masks ------------------------------------------------------------------------------------------------------

    def mask(self, inner: str, mask_function: Callable[..., Any], **arguments: Any) -> Any:
        """What `inner`'s own mask would be over the whole sequence (ulysses), or this rank's rows of it (ring).

        `mask_function` is index based (causal, windows, chunks): it holds for the whole sequence as it does for a part.
        """
        sequences = self.sequences
        assert sequences is not None
        if sequences.documents is not None:
            mask_function = packed_sequence_compatibility_function(
                mask_function, sequences.position_ids, sequences.documents
            )
            arguments["allow_is_causal_skip"] = False
        arguments |= {"attention_mask": sequences.attention_mask, "q_offset": 0, "kv_offset": 0}
        if self.method == "ring":
            return self._rows_of_mask(sequences, mask_function, **arguments)
        build = ALL_MASK_ATTENTION_FUNCTIONS[inner]
        lengths = {"q_length": sequences.length, "kv_length": sequences.length}
        return build(mask_function=mask_function, **{**arguments, **lengths})

    def _rows_of_mask(
        self,
        sequences: Sequences,
        mask_function: Callable[..., Any],
        *,
        batch_size: int,
        attention_mask: Tensor | None,
        allow_is_causal_skip: bool = False,
        local_size: int | None = None,
        use_vmap: bool = False,
        **unused: Any,
    ) -> Tensor | None:
        """bool `[b, 1, s/cp, s]`, columns in rank-major order; None for plain causal attention."""
        if use_vmap:
            raise ValueError(
                "This model adds a mask of its own to causal attention, which ring attention cannot split. "
                "Set cp_attention='ulysses'."
            )
        whole = attention_mask is None or bool(attention_mask.all())
        if allow_is_causal_skip and whole and (local_size is None or local_size >= sequences.length):
            return None
        if attention_mask is not None:
            mask_function = and_masks(mask_function, padding_mask_function(attention_mask))
        columns = sequences.order
        rows = columns.view(self.size, -1)[self.rank]
        batch = torch.arange(batch_size, device=columns.device)[:, None, None, None]
        head = torch.zeros(1, dtype=torch.long, device=columns.device)[None, :, None, None]
        mask = mask_function(batch, head, rows[None, None, :, None], columns[None, None, None, :])
        return mask.expand(batch_size, 1, len(rows), len(columns))


# The group whose micro-batch is running. A plain global: on CUDA, backward recomputes in threads of its own.
_active: ContextParallel | None = None


def install(model: PreTrainedModel, size: int, tp: int = 1, method: CPAttention = "auto") -> Literal["ulysses", "ring"]:
    """Make `model` run attention over sequence shards whenever a `ContextParallel.split` is active.

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
    if method not in ("auto", "ulysses", "ring"):
        raise ValueError(f"cp_attention={method!r} is unknown. Allowed: auto, ulysses, ring.")
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
    return _active.mask(inner, **arguments)


@torch.compiler.disable
def _attention(
    inner: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that models call: query `[b, h, s/cp, d]`, out `[b, s/cp, h, d]`."""
    kernel = _kernel(inner, module)
    layer = _Layer(module, inner, query.shape[1] // key.shape[1])
    if _active is None:
        return kernel(layer, query, key, value, attention_mask, **kwargs)
    if _active.method == "ring":
        causal = kwargs.pop("is_causal", None)
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return ring_attention(query, key, value, attention_mask, _active.group, causal=causal, **kwargs), None
    sequences = _active.sequences
    assert sequences is not None
    kwargs["position_ids"] = sequences.position_ids

    def attend(q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        return kernel(_Layer(module, inner, q.shape[1] // k.shape[1]), q, k, v, attention_mask, **{**kwargs, **extra})[
            0
        ]

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


def _pad_positions(positions: Tensor, length: int, restart: bool) -> Tensor:
    """Positions of the padding: a document of its own in packed rows, going on in others."""
    missing = length - positions.shape[1]
    if not missing:
        return positions
    more = torch.arange(missing, device=positions.device).expand(len(positions), -1)
    return torch.cat([positions, more if restart else positions[:, -1:] + 1 + more], dim=1)


def _refuse_unknown(inputs: dict[str, Any], rows: int, length: int) -> None:
    known = ("input_ids", "position_ids", "attention_mask")
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            continue
        if name not in known or value.ndim != 2 or value.shape[-1] != length:
            raise ValueError(
                f"Context parallel (cp > 1) cannot split the input {name!r} of shape {tuple(value.shape)} of a micro-"
                f"batch of {rows} × {length} tokens. It splits {', '.join(known)}, each [rows, tokens]; set cp=1."
            )


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
