"""How a cut layer runs: one small wrapper around its forward for each style of the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from automodel_trainer.nn.wrap import Forward, wrap
from automodel_trainer.strategies.tensor.collectives import (
    all_reduce,
    gather_features,
    reduce_scatter_sequence,
    slice_features,
    sum_gradient,
)
from automodel_trainer.strategies.tensor.loss_parallel import keeps_logits_sharded
from automodel_trainer.strategies.tensor.plan import BETWEEN, COLUMNS, GATHERED, ROWS, SPLIT_INPUT, TensorPlan


def on_hidden_states(change: Callable[[Tensor], Tensor], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Apply `change` to a module's hidden states `[b, s, h]`: the argument of that name, or else the first one."""
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
    return (change(args[0]), *args[1:]), kwargs


def on_output(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Apply `change` to a module's output `[b, s, h]`, which may be the first item of a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def joint_entries(model: nn.Module, plan: TensorPlan) -> set[str]:
    """Names of modules whose weights all take part in one cut, columns first and rows last: attention and MLPs.

    Every layer that reads such a module's input computes a partial gradient of it, so one sum at the module's entry
    serves them all. In other modules (with a router, or with low-rank projections that are not cut) each layer sums its
    own.
    """
    found = set()
    for name, module in model.named_modules():
        styles = {style for child, style in plan.modules.items() if child.rpartition(".")[0] == name}
        fits = name and styles & COLUMNS and styles <= COLUMNS | ROWS | {BETWEEN, "packed_colwise"}
        if fits and all(_takes_part(name, key, child, plan) for key, child in module.named_modules()):
            found.add(name)
    return found


def _takes_part(entry: str, key: str, module: nn.Module, plan: TensorPlan) -> bool:
    """Whether a module inside `entry` has no parameters, or belongs to one of its layers that has a rule."""
    own = list(module.parameters(recurse=False))
    if not key:
        return all(id(parameter) in plan.placements for parameter in own)
    return not own or f"{entry}.{key.partition('.')[0]}" in plan.modules


def wrap_entry(module: nn.Module, group: ProcessGroup) -> None:
    """Make a module sum the partial gradients of its hidden states, once for all its layers."""

    def forward(original: Forward, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = on_hidden_states(lambda x: sum_gradient(x, group), args, kwargs)
        return original(*args, **kwargs)

    wrap(module, forward)


def wrap_layer(
    model: nn.Module, name: str, style: str, plan: TensorPlan, mesh: DeviceMesh, *, joint: bool, scatter: bool
) -> None:
    """Wrap the forward of a module by its style.

    Args:
        name: the module's name in `model`.
        style: the module's style, one of `plan.STYLES`.
        mesh: the 1-D tp mesh.
        joint: whether the module's parent sums the gradient of its input.
        scatter: whether to leave the output as parts of the sequence.
    """
    module, group = model.get_submodule(name), mesh.get_group()
    if name == plan.head:
        wrap(module, _head(module, mesh))
    elif style in COLUMNS or (style == "packed_colwise" and isinstance(module, nn.Linear)):
        wrap(module, _columns(module, group, joint, style in GATHERED))
    elif style in ROWS:
        wrap(module, _rows(module, group, style in SPLIT_INPUT, scatter))
    elif style == "embedding_rowwise":
        wrap(module, _embedding_rows(module, group))
    elif style == "embedding_colwise":
        wrap(module, lambda f, *a, **k: gather_features(f(*a, **k), group, module.embedding_dim))  # type: ignore[arg-type]
    elif style == "moe_tp_experts" or (style == "all_reduce" and _holds_cut_weights(module, plan)):
        wrap(module, _experts(group))
    elif style == "moe_identity_expert":  # every rank returns 1/tp of the input; the sum over ranks restores it
        wrap(module, lambda f, x, *a, **k: f(x / mesh.size(), *a, **k))
    elif style == "all_reduce":
        wrap(module, lambda f, *a, **k: on_output(lambda x: all_reduce(x, group), f(*a, **k)))
    elif style == "mla_kv_a_proj":
        wrap(module, _latent(_rope_width(model, name), group))


def _holds_cut_weights(module: nn.Module, plan: TensorPlan) -> bool:
    return any(id(parameter) in plan.placements for parameter in module.parameters(recurse=False))


def _columns(module: nn.Module, group: ProcessGroup, joint: bool, gather: bool) -> Forward:
    """A linear layer cut by columns: `[b, s, h]` to this rank's `[b, s, out / ranks]`, gathered if asked."""

    def forward(original: Forward, x: Tensor) -> Tensor:
        y = original(x if joint else sum_gradient(x, group))
        return gather_features(y, group, module.out_features) if gather else y  # type: ignore[arg-type]

    return forward


def _rows(module: nn.Module, group: ProcessGroup, split_input: bool, scatter: bool) -> Forward:
    """A linear layer cut by rows: this rank's `[b, s, in / ranks]` to `[b, s, out]`, summed over ranks.

    Args:
        split_input: the input is whole; take this rank's part of it.
        scatter: return this rank's part of the sequence instead of all of it.
    """
    reduce = reduce_scatter_sequence if scatter else all_reduce

    def forward(original: Forward, x: Tensor) -> Tensor:
        bias = module._parameters.get("bias")
        if bias is None:
            return reduce(original(slice_features(x, group) if split_input else x), group)
        module._parameters["bias"] = None  # add it once, after the sum, not once per rank
        try:
            y = reduce(original(slice_features(x, group) if split_input else x), group)
        finally:
            module._parameters["bias"] = bias
        return y + bias

    return forward


def _head(module: nn.Module, mesh: DeviceMesh) -> Forward:
    """The output head: `[b, s, h]` to logits `[b, s, v]`.

    Inside `sharded_logits` they are a DTensor sharded over the vocabulary, otherwise a gathered plain tensor.
    """
    group = mesh.get_group()

    def forward(original: Forward, x: Tensor) -> Tensor:
        y = original(sum_gradient(x, group))
        width = module.out_features
        assert isinstance(width, int)
        if not keeps_logits_sharded():
            return gather_features(y, group, width)
        # State the shape: `from_local` assumes even shards, and a vocabulary may be uneven.
        shape = torch.Size((*y.shape[:-1], width))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(y, mesh, [Shard(y.ndim - 1)], run_check=False, shape=shape, stride=stride)

    return forward


def _embedding_rows(module: nn.Module, group: ProcessGroup) -> Forward:
    """An embedding cut over the vocabulary: `[b, s]` to `[b, s, h]`.

    Every rank looks up the tokens of its part and uses zeros for the others; the sum over ranks is the embedding.
    """

    def forward(original: Forward, ids: Tensor) -> Tensor:
        weight = module._parameters["weight"]
        assert weight is not None
        rows = weight.shape[0]
        # DTensor shards like `torch.chunk`: ceil(n / ranks) rows each, fewer or none on the last ranks.
        start: int = min(-(-module.num_embeddings // group.size()) * group.rank(), module.num_embeddings)  # type: ignore
        local = ids - start
        outside = (local < 0) | (local >= rows)
        padding = module.padding_idx  # this row gets no gradient; it may belong to another rank's part
        here = padding is not None and 0 <= padding - start < rows  # type: ignore[operator]
        module.padding_idx = padding - start if here else None  # type: ignore
        try:
            found = original(local.masked_fill(outside, 0))
        finally:
            module.padding_idx = padding
        return all_reduce(found.masked_fill(outside[..., None], 0), group)

    return forward


def _experts(group: ProcessGroup) -> Forward:
    """Experts: every rank holds a part of each one, so hidden states and routing weights get partial gradients."""

    def forward(original: Forward, *args: Any, **kwargs: Any) -> Any:
        args = tuple(sum_gradient(a, group) if isinstance(a, Tensor) else a for a in args)
        kwargs = {key: sum_gradient(a, group) if isinstance(a, Tensor) else a for key, a in kwargs.items()}
        return on_output(lambda x: all_reduce(x, group), original(*args, **kwargs))

    return forward


def _latent(rope_width: int, group: ProcessGroup) -> Forward:
    """Multi-head latent attention: sum the gradient of the rotary part of the projected keys.

    The latent part passes through a cut layer, which sums its gradient. The rotary part goes straight to this rank's
    heads, so its gradient is partial.
    """

    def forward(original: Forward, x: Tensor) -> Tensor:
        y = original(x)
        latent, rope = y.split([y.shape[-1] - rope_width, rope_width], dim=-1)
        return torch.cat([latent, sum_gradient(rope, group)], dim=-1)

    return forward


def _rope_width(model: nn.Module, name: str) -> int:
    """The width of the rotary part, as the attention layer or the config states it."""
    parent = model.get_submodule(name.rpartition(".")[0])
    width = getattr(parent, "qk_rope_head_dim", None) or parent.config.get_text_config().qk_rope_head_dim  # type: ignore
    assert isinstance(width, int)
    return width
