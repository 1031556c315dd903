"""What torch keeps of compiled blocks for the next run: nothing is traced again, and other code is not taken for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.compile_worker.subproc_pool import SubprocPool
from torch._inductor.utils import fresh_cache

from automodel_trainer.nn.operators import key_by_operators
from automodel_trainer.strategies.base import activation_checkpointing
from automodel_trainer.strategies.base.activation_checkpointing import Mode, apply_activation_checkpointing
from automodel_trainer.strategies.base.compile import compile_blocks


def twice(factor: float) -> Any:
    """A function x -> 2·x whose gradient is wrong by `factor`. All such functions have one name."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 2 * factor

    return Twice


class Block(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.function.apply(x)).tanh()


@pytest.fixture(autouse=True)
def cache() -> Iterator[None]:
    with fresh_cache(), torch._inductor.config.patch({"cpp.vec_isa_ok": False}):  # else it compiles to find out
        yield
    torch._dynamo.reset()


def gradient(function: Any, mode: Mode | None = None) -> tuple[list[float], dict[str, int]]:
    """The gradient of one block's input as a new process computes it, and what it found of an earlier one."""
    torch._dynamo.reset()
    counters.clear()
    model = nn.Module()
    model.layers = nn.ModuleList([Block(function)])
    if mode is not None:
        apply_activation_checkpointing(model, mode)
    compile_blocks(model.train())
    x = torch.full((1, 4), 0.1, requires_grad=True)
    model.layers[0](x).sum().backward()
    assert x.grad is not None
    found = {name.removeprefix("autograd_cache_"): count for name, count in counters["aot_autograd"].items()}
    return x.grad[0].tolist(), {name: count for name, count in found.items() if name in ("hit", "miss", "bypass")}


def test_functions_with_their_own_gradient() -> None:
    want = [2 * (1 - float(torch.tensor(0.2).tanh()) ** 2)] * 4
    first, of_first = gradient(twice(1))
    again, of_second = gradient(twice(1))
    other, of_third = gradient(twice(10))
    assert (of_first, of_second, of_third) == ({"miss": 1}, {"hit": 1}, {"miss": 1})
    assert first == again == pytest.approx(want)
    assert other == pytest.approx([10 * value for value in want])


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointed_blocks(mode: Mode) -> None:
    plain, _ = gradient(twice(1))
    first, of_first = gradient(twice(1), mode)
    again, of_second = gradient(twice(1), mode)
    assert (of_first, of_second) == ({"miss": 1}, {"hit": 1})
    assert first == again == plain


def test_another_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each version of the files that decide what is kept has a name of its own."""
    made = activation_checkpointing._contexts(activation_checkpointing._recompute)
    names = {contexts.cache_hash for contexts in (activation_checkpointing.SELECTIVE, made)}
    monkeypatch.setattr(activation_checkpointing, "hash_of", lambda *_: "another version")
    names.add(activation_checkpointing._contexts(activation_checkpointing._recompute).cache_hash)
    assert len(names) == 3


def test_processes_that_compile_kernels_use_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the fastest variant of each kernel, which is kept under theirs, would be sought in every run."""
    monkeypatch.setenv("TORCH_COMPILE_CACHE_KEY_TAG", "")
    with torch.compiler.config.patch(cache_key_tag="user"):
        key_by_operators()
        wanted = torch.compiler.config.cache_key_tag
        pool = SubprocPool(1)
        try:
            assert pool.submit(_tag).result(60) == wanted == os.environ["TORCH_COMPILE_CACHE_KEY_TAG"]
        finally:
            pool.shutdown()


def _tag() -> str:
    return str(torch.compiler.config.cache_key_tag)
