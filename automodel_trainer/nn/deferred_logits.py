"""Logits that are not computed yet: the hidden states, and the head that computes logits for some of them at a time.

The logits of a micro-batch are often the largest tensor of a training step (8,192 tokens and a vocabulary of 128,256:
2 GiB in bf16, and more in fp32). `defer_logits` makes a model's head return `DeferredLogits` instead, and the loss
(`modules/loss.py`) then computes them in chunks. Elementwise operations that the model applies to its logits (a scale,
a soft cap) are recorded and applied to each chunk. Any other operation computes the real logits first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from automodel_trainer.nn._torch import pytree

_Change = Callable[[Tensor], Tensor]
# Elementwise functions of one tensor that models use to scale and cap their logits.
_ELEMENTWISE = {torch.tanh, torch.mul, torch.div, torch.true_divide}


class _State:
    """Whether heads defer their logits now.

    It is shared by all threads, unlike a ContextVar: on CUDA, autograd may recompute a forward in threads of its own.
    """

    deferring = False


_state = _State()


class DeferredLogits:
    """Stands in for logits `[..., v]`.

    Args:
        hidden: `[..., h]`, the input of the head.
        head: computes logits `[n, v]` from hidden states `[n, h]`.
        layer: the module that `head` is the forward of.
        changes: elementwise functions applied to the logits, in order.
    """

    def __init__(self, hidden: Tensor, head: _Change, layer: nn.Module, changes: tuple[_Change, ...] = ()) -> None:
        self.hidden, self.head, self.layer, self.changes = hidden, head, layer, changes

    @property
    def plain_weight(self) -> Tensor | None:
        """The head's weight `[v, h]` if the head is a plain `nn.Linear` and no change follows; None otherwise."""
        linear = getattr(self.head, "__func__", None) is nn.Linear.forward and not self.changes
        return self.layer.weight if linear else None  # type: ignore[return-value]

    @property
    def vocabulary(self) -> int:
        """Number of logits per token, counted over all ranks if the head is sharded."""
        layer: Any = self.layer
        return int(getattr(layer, "out_features", None) or layer.weight.shape[0])

    def of(self, hidden: Tensor) -> Tensor:
        """Logits `[..., v]` of hidden states `[..., h]`."""
        logits = self.head(hidden)
        for change in self.changes:
            logits = change(logits)
        return logits

    def whole(self) -> Tensor:
        """All logits, `[..., v]`."""
        return self.of(self.hidden)

    def then(self, change: _Change) -> DeferredLogits:
        """A copy with one more elementwise change at the end."""
        return DeferredLogits(self.hidden, self.head, self.layer, (*self.changes, change))

    def float(self) -> DeferredLogits:
        """Deferred logits in fp32: each chunk is cast when it is computed."""
        return self.then(lambda logits: logits.float())

    def __mul__(self, factor: Any) -> Any:
        return self.then(lambda logits: logits * factor) if _is_number(factor) else self.whole() * factor

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        return self.then(lambda logits: logits / divisor) if _is_number(divisor) else self.whole() / divisor

    def __getitem__(self, index: Any) -> Tensor:
        return self.whole()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocol probes such as `__array__` must not compute the logits
            raise AttributeError(name)
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first, *rest = args
        if function in _ELEMENTWISE and isinstance(first, cls) and all(map(_is_number, (*rest, *kwargs.values()))):
            return first.then(lambda logits: function(logits, *rest, **kwargs))
        args, kwargs = pytree.tree_map_only(
            cls, lambda deferred: deferred.whole(), (args, kwargs), is_leaf=lambda x: isinstance(x, cls)
        )
        return function(*args, **kwargs)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


# FSDP2 registers backward hooks on the tensors in a module's outputs. As a pytree node, DeferredLogits shows it the
# hidden states. (Since torch 2.13 FSDP2 looks inside dataclasses only, so it does not find them; it would warn about
# them anyway, because they are often a view. The outputs of the blocks are enough: the parameters of the outermost unit
# stay gathered until the backward is over.)
pytree.register_pytree_node(
    DeferredLogits,
    lambda logits: ([logits.hidden], (logits.head, logits.layer, logits.changes)),
    lambda hidden, rest: DeferredLogits(*hidden, *rest),  # type: ignore[call-arg, misc]
)


def defer_logits(model: nn.Module) -> None:
    """Make the head of `model` return `DeferredLogits` inside `deferred_logits()`. Without a head, do nothing."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None:
        return
    head.forward = MethodType(partial(_deferring, head.__dict__.get("forward")), head)


def _deferring(wrapped: _Change | None, head: nn.Module, hidden: Tensor) -> Any:
    """The forward of a head: a method, so that a copy of the model has one of its own."""
    forward = MethodType(type(head).forward, head) if wrapped is None else wrapped
    return DeferredLogits(hidden, forward, head) if _state.deferring else forward(hidden)


def defer_from_now(deferring: bool) -> bool:
    """Begin or end to defer logits, where a context cannot be used; returns what was before."""
    before, _state.deferring = _state.deferring, deferring
    return before


@contextmanager
def deferred_logits() -> Iterator[None]:
    """Defer logits in the forwards inside this context. The loss must accept `DeferredLogits`."""
    before, _state.deferring = _state.deferring, True
    try:
        yield
    finally:
        _state.deferring = before
