"""Compute a module that treats every token by itself in tiles of tokens, so that its activations exist for one tile.

The forward keeps the module's input and nothing else. The backward computes each tile again, and adds up the gradients
of the parameters: in fp32, rounded once to the dtype that they have without tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from automodel_trainer.nn.random_states import RandomStates
from automodel_trainer.nn.wrap import Forward, wrap

TILE = 8192  # tokens of a tile that `count="auto"` makes: enough to keep a GPU's matmuls busy
Count = int | Literal["auto"]


def tile(module: nn.Module, count: Count, compiled: Callable[..., Any] | None = None) -> None:
    """Compute the training forward of `module` in tiles, in place. It takes and returns one tensor `[…, s, h]`.

    Call it after everything that changes the module's forward.

    Args:
        count: the number of tiles; "auto": tiles of `TILE` tokens, where there are more than two of them.
        compiled: calls its first argument with the others, compiled. None: nothing is.
    """
    tiles = _Tiles(module, count, compiled or _call)
    wrap(module, tiles.around)


def tile_length(shape: Sequence[int], count: Count) -> int:
    """Length along the sequence of a tile of hidden states `[…, s, h]`."""
    *rows, length, _ = shape
    if count == "auto":
        tokens = torch.Size(rows).numel() * length
        return length if tokens <= 2 * TILE else max(1, TILE * length // tokens)
    return -(-length // count)


def _call(forward: Forward, x: Tensor) -> Any:
    return forward(x)


class _Tiles:
    """The forward of a tiled module."""

    def __init__(self, module: nn.Module, count: Count, call: Callable[..., Any]) -> None:
        self.module, self.count, self.call = module, count, call

    def around(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        x, *others = (*args, *kwargs.values())
        length = x.shape[-2] if others else tile_length(x.shape, self.count)
        if length >= x.shape[-2] or not (self.module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return self.run(forward, x, length)

    @torch.compiler.disable
    def run(self, forward: Forward, x: Tensor, length: int) -> Tensor:
        """The module's output `[…, s, h]`, in tiles of `length`. A compiled block is cut here."""
        held = _held(self.module)
        trained = [entry for entry in held if entry.tensor.requires_grad]
        # What the backward reads is saved before anything is computed. Activation checkpointing stops there, if nothing
        # behind it is saved: so a checkpointed block computes its MLP twice, as without tiles, and not three times.
        saved = _Keep.apply(torch.empty(0, requires_grad=True), x)
        job = _Job(forward, self.call, held, saved, length, _states(self.module, x), _autocast(x))
        out: Tensor = _Tiled.apply(job, x, *(entry.tensor for entry in trained))
        return out


@dataclass(frozen=True)
class _Held:
    """A parameter of a module as its forward sees it: a shard, perhaps, that it has for the time of a block only."""

    module: nn.Module
    name: str
    tensor: Tensor
    leaf: Tensor  # the same numbers; gradients of trained ones are taken of it


@dataclass
class _Job:
    """What the backward needs beside the input."""

    forward: Forward
    call: Callable[..., Any]
    held: list[_Held]
    saved: Tensor  # made by the graph's node that holds the input; up to torch 2.11 the node lives as long as it
    length: int
    states: RandomStates | None
    autocast: tuple[str, bool, torch.dtype]

    def tiles(self, x: Tensor) -> Iterator[tuple[int, int]]:
        """Where the tiles of `x` begin and end."""
        for start in range(0, x.shape[-2], self.length):
            yield start, min(start + self.length, x.shape[-2])

    def compute(self, x: Tensor) -> Tensor:
        """The output of a tile `[…, length, h]` with its graph. The last tile is filled up: then all have one shape."""
        missing = self.length - x.shape[-2]
        out = self.call(self.forward, F.pad(x, (0, 0, 0, missing)) if missing else x)
        return out[..., : x.shape[-2], :] if missing else out  # type: ignore[no-any-return]

    @contextmanager
    def prepared(self, *, again: bool) -> Iterator[None]:
        """A context to compute in: gradients on, the parameters seen in the forward, its autocast and its numbers."""
        device, enabled, dtype = self.autocast
        numbers = self.states.again() if again and self.states is not None else nullcontext()
        cast = torch.autocast(device, dtype=dtype, cache_enabled=False) if enabled else nullcontext()
        # What autograd saves of a tile is nothing that hooks around the block should see: it is gone after the tile.
        alone = saved_tensors_hooks(Tensor.detach, lambda tensor: tensor)
        with torch.enable_grad(), cast, numbers, alone, _seated(self.held):
            yield


class _Keep(torch.autograd.Function):
    """Saves a tensor before it is used; see `_Tiles.run`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise AssertionError("nothing depends on this")


class _Tiled(torch.autograd.Function):
    """x `[…, s, h]` -> `[…, s, h]`. The parameters are arguments only to receive their gradients."""

    @staticmethod
    def forward(ctx: Any, job: _Job, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.job = job
        out: Tensor | None = None
        with job.prepared(again=False):
            for start, end in job.tiles(x):
                # With a graph, which is dropped: compiled code is then the same as in the backward.
                part = job.compute(x[..., start:end, :].detach().requires_grad_()).detach()
                out = part.new_empty((*x.shape[:-1], part.shape[-1])) if out is None else out
                out[..., start:end, :] = part
        assert out is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        job: _Job = ctx.job
        (x,) = job.saved.grad_fn.saved_tensors  # type: ignore[union-attr]
        leaves = [held.leaf for held in job.held if held.tensor.requires_grad]
        wanted = [leaf for leaf, needed in zip(leaves, ctx.needs_input_grad[2:], strict=True) if needed]
        of_x = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        sums = _Sums(wanted)
        with job.prepared(again=True):
            for start, end in job.tiles(x):
                part = x[..., start:end, :].detach().requires_grad_()
                out = job.compute(part)
                found = torch.autograd.grad(out, [part, *wanted], gradient[..., start:end, :], allow_unused=True)
                sums.add(found[1:])
                if of_x is not None and found[0] is not None:
                    of_x[..., start:end, :] = found[0]
        made = iter(sums.rounded())
        return None, of_x, *(next(made) if needed else None for needed in ctx.needs_input_grad[2:])


class _Sums:
    """Sums of gradients over tiles, in fp32 or wider."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._sums: list[Tensor | None] = [None] * len(leaves)
        self._dtypes: list[torch.dtype | None] = [None] * len(leaves)

    @torch.no_grad()
    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of a tile."""
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            total, self._dtypes[index] = self._sums[index], gradient.dtype
            if total is None:
                self._sums[index] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            else:
                total.add_(gradient)

    def rounded(self) -> list[Tensor | None]:
        """The sums, in the dtypes of the gradients."""
        return [s if s is None or d is None else s.to(d) for s, d in zip(self._sums, self._dtypes)]


def _held(module: nn.Module) -> list[_Held]:
    entries = [(part, name, p) for part in module.modules() for name, p in part._parameters.items() if p is not None]
    return [_Held(part, name, p, p.detach().requires_grad_() if p.requires_grad else p) for part, name, p in entries]


@contextmanager
def _seated(held: Sequence[_Held]) -> Iterator[None]:
    """A context in which modules have the parameters that they had in the forward, as leaves."""
    before = [(entry.module, entry.name, entry.module._parameters[entry.name]) for entry in held]
    try:
        for entry in held:
            entry.module._parameters[entry.name] = entry.leaf  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def _autocast(x: Tensor) -> tuple[str, bool, torch.dtype]:
    kind = x.device.type
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _states(module: nn.Module, x: Tensor) -> RandomStates | None:
    """The states of the random generators, if the module draws numbers."""
    if not any(
        getattr(part, "lora_dropout", 0) or (isinstance(part, nn.Dropout) and part.p) for part in module.modules()
    ):
        return None
    return RandomStates(x.device)
