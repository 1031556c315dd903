"""Records a model's discrete choices, such as a router's choice of experts, and by what margin each was made.

A choice is a `topk` or an `argmax` along a dimension of floating-point scores, in the forward of one of the model's
modules. Calls outside of these modules do not count: the balancing loss in the model's own forward makes some, on the
same scores.
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

_MASKED = -1e8  # models mask scores with −inf or the smallest number of the dtype: below this a score is masked


@dataclass
class Choice:
    """The choices that one call of `topk` or `argmax` makes.

    Args:
        module: the name of the module whose forward makes the call.
        scores: `[…, n]`, fp32; the largest are chosen.
        chosen: bool `[…, n]`: which are chosen.
    """

    module: str
    scores: Tensor
    chosen: Tensor

    def gaps(self) -> Tensor:
        """The gap between the lowest score chosen and the highest not chosen, as a part of the row's `scale`. `[…]`

        It is infinite where the row decides nothing: one of the two scores is masked by −inf, or both by zero.
        """
        last = self.scores.where(self.chosen, math.inf).amin(-1)
        first = self.scores.where(~self.chosen, -math.inf).amax(-1)
        decided = (torch.minimum(last, first) > _MASKED) & ((last != 0) | (first != 0))
        return ((last - first) / self.scale()).where(decided, math.inf)

    def taken(self) -> Tensor:
        """What is chosen, bool `[…, n]`, without masked scores: `topk` takes those only to fill up its k."""
        decided = self.gaps()[..., None].isfinite() | (self.scores != 0)
        return self.chosen & (self.scores > _MASKED) & decided

    def scale(self) -> Tensor:
        """The largest absolute score of each row, without masked ones. `[…]`"""
        return self.scores.abs().where(self.scores > _MASKED, 0).amax(-1).clamp(min=1e-30)


class ChoiceRecorder:
    """Keeps the choices of a model's forward passes. Recomputation in a backward pass is not recorded again.

    Args:
        model: whole or in stages.
        names: the modules to watch; None watches all.
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
        """Return the choices since the last `take`, and forget them."""
        calls, self.calls = self.calls, []
        return calls

    def stop(self) -> None:
        """Stop watching, for good."""
        self._close()
        for handle in self._handles:
            handle.remove()

    def _open(self) -> None:
        self._close()  # an exception may have ended the last forward before its hook ran
        self._inside = []
        self._mode = _Watch(self)
        self._mode.__enter__()

    def _close(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None

    def _enter(self, name: str) -> None:
        if self._mode is not None:  # None in backward, where checkpointed modules run their forward again
            self._inside.append(name)

    def _leave(self) -> None:
        if self._mode is not None:
            self._inside.pop()

    def seen(self, call: Any, result: Any, args: Any, kwargs: Any) -> None:
        """Record a call of `topk` or `argmax`, if it is a choice."""
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
    if indices.shape[dim] >= scores.shape[dim] or not scores.numel():  # all are taken, or there is nothing to take
        return None
    scores = scores.detach().movedim(dim, -1).float().clone()
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, indices.movedim(dim, -1), True)
    return Choice(module, scores if largest else -scores, chosen)


@dataclass
class Margin:
    """How close a run's choices were.

    Args:
        smallest: the smallest gap of all choices; infinite if none was decided.
        choices: the number of choices.
        module: the module with the smallest gap.
    """

    smallest: float = math.inf
    choices: int = 0
    module: str = ""

    def add(self, calls: Iterable[Choice]) -> None:
        """Include the gaps of these calls."""
        for call in calls:
            gaps = call.gaps()
            self.choices += gaps.numel()
            if (gap := float(gaps.min())) < self.smallest:
                self.smallest, self.module = gap, call.module


def rounding(terms: int) -> float:
    """The error that rounding may cause in fp32 scores, as a part of the largest: 8 · ε · √terms.

    Summing in another order gives errors that grow as the root of the number of terms. Measured errors stay below a
    tenth of this.

    Args:
        terms: how many products a score sums.
    """
    return 8 * torch.finfo(torch.float32).eps * math.sqrt(terms)
