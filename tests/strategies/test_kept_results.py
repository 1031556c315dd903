"""Results of attention are kept where there is room, and numbers stay the same bit for bit."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_trainer.models.kernels.attention import install_attention_kernel
from automodel_trainer.models.kernels.token_mlps import find_token_mlps
from automodel_trainer.nn import offload
from automodel_trainer.nn._torch import ATTENTION
from automodel_trainer.nn.offload import HostInputs
from automodel_trainer.nn.tiles import tile
from automodel_trainer.strategies.base.activation_checkpointing import apply_activation_checkpointing, offload_inputs
from automodel_trainer.strategies.base.compile import compile_blocks
from tests.harness import close
from tests.tiny import tiny_model

LAYERS = 3
PIECE = 4096


class CountAttention(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func in ATTENTION
        return func(*args, **(kwargs or {}))


def run(host: HostInputs | None, compiled: bool = False) -> tuple[dict[str, Tensor], int]:
    """Gradients of two micro-batches, and how often attention was computed, if nothing is compiled."""
    torch.manual_seed(0)
    model = tiny_model("llama", num_hidden_layers=LAYERS).train()
    install_attention_kernel(model)
    if host is None:
        apply_activation_checkpointing(model, "full")
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model, "aot_eager")
    if host is not None:
        offload_inputs(list(model.model.layers), host)
    counter = CountAttention()
    for seed in (1, 2):
        ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(seed))
        with nullcontext() if compiled else counter:
            model(input_ids=ids, use_cache=False).logits.sin().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, counter.calls


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALL", 1)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_attention_runs_once() -> None:
    plain, twice = run(None)
    found, once = run(HostInputs(piece=PIECE))
    assert (twice, once) == (2 * 2 * LAYERS, 2 * LAYERS)
    assert same(found, plain)


def test_compiled_blocks() -> None:
    """Outside of offloaded blocks compiled code holds attention: another model is not cut."""
    found, _ = run(HostInputs(piece=PIECE), compiled=True)
    torch._dynamo.utils.counters.clear()
    plain, _ = run(None, compiled=True)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert found.keys() == plain.keys()
    for name, gradient in found.items():
        close(gradient, plain[name])


def test_each_tensor_is_copied_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles hold what a block has stored until the whole graph is freed: none of it may lie on the device."""
    on_device: list[int] = []
    stored: WeakSet[Any] = WeakSet()
    copy, restore = offload._Stored._copy, HostInputs._restore
    copies = Counter[int]()

    def counted_copy(self: Any, tensor: Tensor, *, out: bool) -> None:
        stored.add(self)
        copies[id(self)] += not out
        copy(self, tensor, out=out)

    def watched_restore(self: HostInputs, saved: Any) -> Tensor:
        tensor = restore(self, saved)
        on_device.append(sum(entry.on_device is not None for entry in stored))
        return tensor

    monkeypatch.setattr(offload._Stored, "_copy", counted_copy)
    monkeypatch.setattr(HostInputs, "_restore", watched_restore)
    model = tiny_model("llama", num_hidden_layers=8).train()
    install_attention_kernel(model)
    for mlp in find_token_mlps(model):
        tile(mlp, 4)
    offload_inputs(list(model.model.layers), HostInputs(piece=PIECE))
    loss = model(input_ids=torch.arange(16)[None], use_cache=False).logits.sin().sum()
    loss.backward()
    assert len(stored) == 8 * 3  # an input, a result, and a number for each query
    assert max(copies.values()) == 1
    assert max(on_device) <= 3
    assert on_device[-1] == 0


def test_inputs_come_first() -> None:
    """A block's input `[2, 16, 32]` takes one piece, its attention two: the result, and a number for each query."""
    for pieces, kept in ((LAYERS, 0), (LAYERS + 2, 1), (3 * LAYERS, LAYERS)):
        host = HostInputs(limit=pieces * PIECE, piece=PIECE)
        _, calls = run(host)
        assert calls == 2 * (2 * LAYERS - kept)
        assert not host.full
        assert host.results == {0: "none", 1: "some", LAYERS: "all"}[kept]
        assert host.held <= pieces * PIECE
