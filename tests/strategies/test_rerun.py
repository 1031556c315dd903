"""Inputs that host memory has no room for are computed again: the numbers of "full" bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from automodel_trainer.nn import offload
from automodel_trainer.nn.offload import PIECE, HostInputs
from automodel_trainer.nn.rerun import LONGEST, Run, is_held
from automodel_trainer.strategies.base.activation_checkpointing import apply_activation_checkpointing, offload_inputs
from tests.matrix import more
from tests.pool import RankPool
from tests.strategies.test_compile import COMPILED
from tests.strategies.test_offload import Pairs, both


@pytest.mark.parametrize(("blocks", "room"), [(1, 0), (5, 9), (32, 13), (32, 31), (32, 0), (61, 3), (7, 4)])
def test_spread(blocks: int, room: int) -> None:
    """As many as there is room for, the first among them, with gaps that differ by one at most."""
    held = [position for position in range(blocks) if is_held(position, blocks, room)]
    assert held[0] == 0
    assert len(held) == min(blocks, max(room, -(-blocks // LONGEST)))
    gaps = [b - a for a, b in zip(held, [*held[1:], blocks])]
    assert max(gaps) - min(gaps) <= 1
    assert max(gaps) <= LONGEST


def with_room(spec: str, world_size: int, family: str, room: int, **options: Any) -> tuple[list[str], int, int]:
    """`both` of six blocks, with host memory for so many inputs; and how often a block ran again.

    A tiny input takes one piece.
    """
    runs = []
    result = Run.result

    def counted(self: Run, index: int, *, last: bool) -> Tensor:
        runs.append(index not in self._found)
        return result(self, index, last=last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "usable_host_memory", lambda ranks: room * PIECE)
        patch.setattr(Run, "result", counted)
        different, held = both(spec, world_size, family, num_hidden_layers=6, **options)
    return different, held, sum(runs)


@pytest.mark.parametrize(
    ("spec", "family", "room", "options"),
    [
        ("fsdp2:compile=false", "llama", 2, {"tie_word_embeddings": True}),
        ("fsdp2:compile=false", "qwen3", 3, {"lora": True, "precision": "bf16"}),
        ("ddp:compile=false", "gpt2", 0, {"attn_pdrop": 0.1, "resid_pdrop": 0.1}),
        more(f"fsdp2:{COMPILED}", "qwen3", 2, {"lora": True, "precision": "bf16"}),
        more("fsdp2:compile=false,cpu_offload=true", "llama", 2, {"precision": "bf16"}),
        more("ddp:compile=false", "gemma3_text", 2, {"precision": "bf16"}),
        more("fsdp2:compile=false", "qwen3_moe", 2, {}),
    ],
)
def test_one_device(spec: str, family: str, room: int, options: dict[str, Any]) -> None:
    """Packed and plain rows, dropout, two dtypes; weights that are cast, and that lie in host memory."""
    different, held, runs = with_room(spec, 1, family, room, **options)
    assert not different
    assert held == room * PIECE
    assert runs
    assert runs % (6 - max(room, 1)) == 0  # in each micro-batch


@pytest.mark.parametrize(
    ("spec", "again"),
    [("ddp:compile=false", True), ("fsdp2:compile=false", False), more("3d:pp=2,compile=false", False)],
)
def test_ranks(pool: RankPool, spec: str, again: bool) -> None:
    """Ranks that share a block keep what does not fit: all must call the same collectives, and rows may differ."""
    for different, _, runs in pool.run(2, with_room, spec, 2, "llama", 1):
        assert not different
        assert bool(runs) == again


class Block(nn.Module):
    """A block with dropout. It counts its forwards with gradients."""

    forwards = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        self.forwards += torch.is_grad_enabled()  # others would be other compiled code
        return hidden + nn.functional.dropout(torch.tanh(self.inner(hidden)), 0.2)


class Blocks(nn.Module):
    """Eight blocks. What `between` does follows the fifth."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda hidden: hidden) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(8))
        self.between = between

    def forward(self, hidden: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            hidden = block(hidden)
            if i == 4:
                hidden = self.between(hidden)
        return hidden


def gradients(mode: str, host: HostInputs, **options: Any) -> tuple[list[Tensor], list[int]]:
    """Two gradients of one graph under autocast, and the forwards of each block."""
    torch.manual_seed(0)
    model = Blocks(**options).train()
    apply_activation_checkpointing(model, mode)  # type: ignore[arg-type]
    if mode == "offload":
        offload_inputs(list(model.blocks), host)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 8)).square().mean()
    first = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
    torch.randn(3)  # other random numbers
    return [*first, *torch.autograd.grad(loss, [*model.parameters()])], [b.forwards for b in model.blocks]  # type: ignore[misc]


def test_each_block_once_more() -> None:
    """Room for three inputs of eight: the others cost one forward each in a backward, also of a retained graph."""
    host = HostInputs(limit=3 * 128, piece=64)
    full, forwards = gradients("full", host)
    assert forwards == [3] * 8
    found, forwards = gradients("offload", host)
    assert all(map(torch.equal, full, found))
    # held: 0, 3, 6
    assert forwards == [5, 5, 3, 5, 5, 3, 5, 3]
    assert (host.held, host.full, host.again) == (3 * 128, False, True)


def add_in_place(hidden: Tensor) -> Tensor:
    return hidden.add_(1)


def transposed_twice(hidden: Tensor) -> Tensor:
    return hidden.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize(
    "between", [add_in_place, torch.sigmoid, torch.clone, transposed_twice, lambda x: x[:2], lambda x: x[:0]]
)
def test_what_happens_between_blocks(between: Callable[[Tensor], Tensor]) -> None:
    """A changed result is no input: the chain begins anew, with an input that is kept."""
    host = HostInputs(limit=2 * 128, piece=64)
    full, _ = gradients("full", host, between=between)
    found, _ = gradients("offload", host, between=between)
    assert all(map(torch.equal, full, found))
    assert host.again


def test_a_pair() -> None:
    """A block that gives two tensors runs once for both."""
    results: list[Sequence[Tensor]] = []
    for limit in (2**20, 256):
        torch.manual_seed(0)
        model, host = Pairs().train(), HostInputs(limit=limit, piece=64)
        offload_inputs(list(model.blocks), host)
        x = torch.arange(32.0).reshape(4, 8).div(32).requires_grad_()
        results.append(torch.autograd.grad(model(x).sum(), [x, *model.parameters()]))
        assert host.again == (limit == 256)
    assert all(map(torch.equal, *results))
