"""Logits that are not there yet: hidden states, and the head that will make logits of a few of them at a time.

The logits of a micro-batch are often the largest tensor of a training step (8,192 tokens and a vocabulary of 128,256:
2 GiB in bf16, and more in fp32). `defer_logits` makes a model's head hand over a `DeferredLogits` in their place; the
loss (`loss.py`) then goes through it in chunks. What a model does to its logits afterwards element by element (a scale,
a soft cap) is remembered and done to every chunk. Anything else that is done to them gets the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_Change = Callable[[Tensor], Tensor]
# Functions of one tensor, element by element: how models scale and cap their logits.
_ELEMENTWISE = {torch.tanh, torch.mul, torch.div, torch.true_divide}
_deferring = False  # a plain global: on CUDA, backward may recompute in threads of its own


class DeferredLogits:
    """Stands for `[..., v]` logits.

    Args:
        hidden: `[..., h]`, what the head is given.
        head: makes logits of hidden states `[n, h]`.
        layer: the module whose forward `head` is.
        changes: what is done to logits after that, each element by itself.
    """

    def __init__(self, hidden: Tensor, head: _Change, layer: nn.Module, changes: tuple[_Change, ...] = ()) -> None:
        self.hidden, self.head, self.layer, self.changes = hidden, head, layer, changes

    @property
    def plain_weight(self) -> Tensor | None:
        """The head's weight `[v, h]`, if logits are hidden states times it (and the layer's bias), and nothing more."""
        linear = getattr(self.head, "__func__", None) is nn.Linear.forward and not self.changes
        return self.layer.weight if linear else None  # type: ignore[return-value]

    @property
    def vocabulary(self) -> int:
        """How many logits a token has (of the whole head, also where it is cut over ranks)."""
        layer: Any = self.layer
        return int(getattr(layer, "out_features", None) or layer.weight.shape[0])

    def of(self, hidden: Tensor) -> Tensor:
        """The logits of some hidden states: `[..., h]` to `[..., v]`."""
        logits = self.head(hidden)
        for change in self.changes:
            logits = change(logits)
        return logits

    def whole(self) -> Tensor:
        """All of them."""
        return self.of(self.hidden)

    def then(self, change: _Change) -> DeferredLogits:
        """The same with one more change."""
        return DeferredLogits(self.hidden, self.head, self.layer, (*self.changes, change))

    def float(self) -> DeferredLogits:
        return self.then(lambda logits: logits.float())

    def __mul__(self, factor: Any) -> Any:
        return self.then(lambda logits: logits * factor) if _is_number(factor) else self.whole() * factor

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        return self.then(lambda logits: logits / divisor) if _is_number(divisor) else self.whole() / divisor

    def __getitem__(self, index: Any) -> Tensor:
        return self.whole()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
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


# Sharding puts hooks on the tensors in a model's outputs: they shall find the hidden states. (Since torch 2.13 FSDP2
# looks in dataclasses alone, and would warn of these, which are often a view. It finds its blocks' outputs, which is
# enough: what the outermost unit holds stays gathered until the backward has passed.)
pytree.register_pytree_node(
    DeferredLogits,
    lambda logits: ([logits.hidden], (logits.head, logits.layer, logits.changes)),
    lambda hidden, rest: DeferredLogits(*hidden, *rest),  # type: ignore[call-arg, misc]
)


def defer_logits(model: nn.Module) -> None:
    """Make the head of `model` (if it has one) defer its logits inside of `deferred_logits()`."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None:
        return
    original = head.forward

    def forward(hidden: Tensor) -> Any:
        return DeferredLogits(hidden, original, head) if _deferring else original(hidden)

    head.forward = forward


@contextmanager
def deferred_logits() -> Iterator[None]:
    """The forward in here is that of an objective, whose loss knows what to do with `DeferredLogits`."""
    global _deferring
    before, _deferring = _deferring, True
    try:
        yield
    finally:
        _deferring = before
