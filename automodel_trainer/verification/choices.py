"""The choices that a model makes of its scores, as of experts: what is taken, and by what margin.

A choice is a `topk` or an `argmax` along a dimension of floating-point scores, made in the forward of one of a model's
modules. What the model's own forward chooses outside of them is left out: a balancing loss does, of the same scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

_MASKED = -1e8  # whoever is not to be chosen has a score of −inf, or the smallest of its dtype


@dataclass
class Choice:
    """One call.

    Args:
        module: whose forward makes it.
        scores: `[…, n]`, fp32; the largest are chosen.
        chosen: `[…, n]`, what of it is.
    """

    module: str
    scores: Tensor
    chosen: Tensor

    def gaps(self) -> Tensor:
        """By how much the last score chosen is above the first that is not, as a part of the row's largest. `[…]`

        Infinite where nothing is decided: one of the two is masked, by −inf or (both) by zero.
        """
        last = self.scores.where(self.chosen, math.inf).amin(-1)
        first = self.scores.where(~self.chosen, -math.inf).amax(-1)
        decided = (torch.minimum(last, first) > _MASKED) & ((last != 0) | (first != 0))
        return ((last - first) / self.scale()).where(decided, math.inf)

    def taken(self) -> Tensor:
        """What is chosen, without masked scores, which may be taken to fill up."""
        decided = self.gaps()[..., None].isfinite() | (self.scores != 0)
        return self.chosen & (self.scores > _MASKED) & decided

    def scale(self) -> Tensor:
        """The largest score of each row, masked ones left out."""
        return self.scores.abs().where(self.scores > _MASKED, 0).amax(-1).clamp(min=1e-30)


class ChoiceRecorder:
    """Keeps the choices of a model's forward passes; what a backward pass computes again is not kept again.

    Args:
        model: whole or in stages; its modules' forwards are watched.
        names: modules to watch; None: all.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        self.calls: list[Choice] = []
        self._inside: list[str] = []
        self._mode: _Watch | None = None
        wanted = None if names is None else set(names)
        modules = [(n, m) for n, m in model.named_modules() if n and (wanted is None or n in wanted)]
        self._handles = [model.register_forward_pre_hook(lambda *_: self._open(), prepend=True)]
        self._handles += [m.register_forward_pre_hook(lambda *_, n=n: self._enter(n)) for n, m in modules]
        self._handles += [m.register_forward_hook(lambda *_: self._leave()) for _, m in modules]
        self._handles.append(model.register_forward_hook(lambda *_: self._close()))

    def take(self) -> list[Choice]:
        """The choices since this was last asked for."""
        calls, self.calls = self.calls, []
        return calls

    def stop(self) -> None:
        """Stop watching."""
        self._close()
        for handle in self._handles:
            handle.remove()

    def _open(self) -> None:
        self._close()  # of a forward that an exception ended
        self._inside = []
        self._mode = _Watch(self)
        self._mode.__enter__()

    def _close(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None

    def _enter(self, name: str) -> None:
        if self._mode is not None:  # not in backward, which runs outside of the model's forward
            self._inside.append(name)

    def _leave(self) -> None:
        if self._mode is not None:
            self._inside.pop()

    def seen(self, call: Any, result: Any, args: Any, kwargs: Any) -> None:
        """Note a call, if it is a choice."""
        if self._inside and (choice := call(self._inside[-1], result, *args, **kwargs)) is not None:
            self.calls.append(choice)


class _Watch(TorchFunctionMode):
    def __init__(self, recorder: ChoiceRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is torch.topk or function is Tensor.topk:
            self.recorder.seen(_topk, result, args, kwargs)
        elif function is torch.argmax or function is Tensor.argmax:
            self.recorder.seen(_argmax, result, args, kwargs)
        return result


def _topk(module: str, result: Any, input: Tensor, k: int, dim: int = -1, largest: bool = True, **_: Any) -> Any:
    return _choice(module, input, result[1], dim, largest)


def _argmax(module: str, result: Any, input: Tensor, dim: int | None = None, keepdim: bool = False, **_: Any) -> Any:
    if dim is None:
        return None
    return _choice(module, input, result if keepdim else result.unsqueeze(dim), dim, True)


@torch.no_grad()
def _choice(module: str, scores: Tensor, indices: Tensor, dim: int, largest: bool) -> Choice | None:
    if isinstance(scores, DTensor):
        scores = scores.full_tensor()
    if isinstance(indices, DTensor):
        indices = indices.full_tensor()
    if not scores.is_floating_point() or scores.is_meta or scores.ndim < 2:
        return None
    if indices.shape[dim] >= scores.shape[dim] or not scores.numel():  # all are taken, or there is nothing
        return None
    scores = scores.detach().movedim(dim, -1).float().clone()
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices.movedim(dim, -1), True)
    return Choice(module, scores if largest else -scores, chosen)


@dataclass
class Margin:
    """How close a run's choices were.

    Args:
        smallest: the smallest gap of all; infinite if none was decided.
        choices: how many were made.
        module: where the smallest gap is.
    """

    smallest: float = math.inf
    choices: int = 0
    module: str = ""

    def add(self, calls: Iterable[Choice]) -> None:
        """Take the gaps of these calls into account."""
        for call in calls:
            gaps = call.gaps()
            self.choices += gaps.numel()
            if (gap := float(gaps.min())) < self.smallest:
                self.smallest, self.module = gap, call.module


def rounding(terms: int) -> float:
    """What scores may be off by, as a part of the largest, in fp32: eight units of roundoff for sums of `terms`.

    Errors of sums in another order grow as the root of their number. Measured, they stay below a tenth of this.
    """
    return 8 * torch.finfo(torch.float32).eps * math.sqrt(terms)
