"""Inputs of blocks in host memory: the numbers of "full" bit for bit, and no more host memory than said.

On a CPU the copies are the same; only streams and their events are a GPU's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from automodel_trainer.callbacks import Ledger
from automodel_trainer.callbacks.ledger_text import ledger_rows
from automodel_trainer.models.lora import LoRAConfig, apply_lora, finish_lora
from automodel_trainer.nn import host_memory
from automodel_trainer.nn.host_memory import available_host_memory, usable_host_memory
from automodel_trainer.nn.offload import HostInputs, HostPieces
from automodel_trainer.strategies import DDPStrategy
from automodel_trainer.strategies.base.activation_checkpointing import apply_activation_checkpointing, offload_inputs
from automodel_trainer.strategies.base.compile import compile_blocks
from tests.callbacks.test_ledger import fit
from tests.harness import NextToken, check_steps, make_strategy, train_steps
from tests.matrix import more
from tests.pool import RankPool
from tests.strategies import pipeline_runs, test_expert
from tests.strategies.test_compile import COMPILED
from tests.strategies.test_parity import reference, train
from tests.tiny import tiny_model


def both(spec: str, world_size: int, family: str, lora: bool = False, precision: str = "fp32", **overrides: Any) -> Any:
    """Steps with "full" and with "offload": where they differ, and the host memory that was in use."""
    results, held = [], 0
    steps = 1 if "compile=true" in spec else 2  # packed rows in the second would be compiled again
    for mode in ("full", "offload"):
        torch.manual_seed(1)
        strategy = make_strategy(f"{spec},activation_checkpointing={mode}", world_size, precision)
        if family in test_expert.FAMILIES:
            model = test_expert.build(family, skewed=False, **overrides)
        else:
            model = tiny_model(family, **{"num_hidden_layers": 3, **overrides})
        if lora:
            apply_lora(model, LoRAConfig(rank=4, init="orthogonal", dropout=0.1))
        strategy.parallelize(model.train())
        finish_lora(model)
        optimizer = pipeline_runs.adam(model)
        results.append(train_steps(strategy, NextToken(model), optimizer, test_expert.rows_of, 2, steps=steps))
        held = strategy.prepared.host.held if strategy.prepared.host else 0
    return [name for name in results[0] if not same(results[0][name], results[1][name])], held


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal, every bit of them."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else bool(a == b)


@pytest.mark.parametrize(
    ("spec", "family", "options"),
    [
        ("fsdp2:compile=false", "llama", {"tie_word_embeddings": True}),
        ("fsdp2:compile=false", "qwen3", {"lora": True, "precision": "bf16"}),
        more(f"fsdp2:{COMPILED}", "qwen3", {"lora": True, "precision": "bf16"}),
        ("ddp:compile=false", "gpt2", {}),
        more("fsdp2:compile=false", "mamba", {"state_size": 8}),
        more("fsdp2:compile=false", "gemma3_text", {"precision": "bf16"}),
    ],
)
def test_one_device(spec: str, family: str, options: dict[str, Any]) -> None:
    """Packed and plain rows, dropout of adapters, whole models in two dtypes."""
    different, held = both(spec, 1, family, **options)
    assert not different
    assert held


@pytest.mark.parametrize(
    ("spec", "world_size", "family", "options"),
    [
        ("fsdp2:cp=2", 2, "qwen3", {}),
        ("fsdp2:tp=2", 2, "llama", {}),
        more(f"fsdp2:tp=2,{COMPILED}", 2, "llama", {}),  # compiled: test_pairs_by_name
        ("fsdp2:ep=2", 2, "qwen3_moe", {}),
        ("3d:pp=2,schedule=interleaved_1f1b", 2, "llama", {"tie_word_embeddings": True, "num_hidden_layers": 4}),
        more("3d:pp=2,tp=2,schedule=zbv", 4, "qwen3", {"num_hidden_layers": 4}),
        more("hsdp:dp_replicate=2", 4, "llama", {}),
        more("ddp:bucket_cap_mb=1", 2, "llama", {}),
    ],
)
def test_ranks(pool: RankPool, spec: str, world_size: int, family: str, options: dict[str, Any]) -> None:
    for different, held in pool.run(world_size, both, spec, world_size, family, **options):
        assert not different
        assert held


@pytest.mark.parametrize("spec", [more(f"fsdp2:cp=2,cp_attention=ring,{COMPILED},activation_checkpointing=offload")])
def test_cut_blocks(pool: RankPool, spec: str) -> None:
    """Against one device: with "full" the compiler recomputes in one graph, which rounds otherwise."""
    check_steps(pool.run(2, train, spec, 2, 2, "qwen3", False), reference("qwen3", tied=False))


class Pair(nn.Module):
    """A block that gets and gives a pair of tensors by name, as some models pass a residual beside the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, *, scale: float, state: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden, residual = state
        return torch.tanh(self.inner(hidden)) * mask * scale, residual + hidden


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        state, mask = (x, x), torch.ones(8)
        for block in self.blocks:
            state = block(scale=2.0, state=state, mask=mask)
        return state[0] + state[1]


@pytest.mark.parametrize("compiled", [False, True])
def test_pairs_by_name(compiled: bool) -> None:
    """Both tensors of the pair go to the host, and a mask that all blocks share does not."""
    results: list[list[Tensor]] = []
    host = HostInputs(limit=2**20, piece=64)
    for mode in ("full", "offload"):
        torch.manual_seed(0)
        model = Pairs().train()
        apply_activation_checkpointing(model, mode)  # type: ignore[arg-type]
        if compiled:
            compile_blocks(model, "aot_eager")
        if mode == "offload":
            offload_inputs(list(model.blocks), host)
        x = torch.arange(32.0).reshape(4, 8).div(32).requires_grad_()
        out = model(x)
        if mode == "offload":  # [4, 8] in fp32
            assert host.held == 3 * 2 * 128
        out.sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in model.parameters())])  # type: ignore[list-item]
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_one_graph_twice_and_a_graph_without_backward() -> None:
    """A retained graph gives the same gradients again; a graph that is dropped gives its memory back."""
    host = HostInputs(limit=2**20, piece=64)
    model = Pairs().train()
    apply_activation_checkpointing(model, "offload")
    offload_inputs(list(model.blocks), host)
    loss = model(torch.ones(4, 8)).sum()
    first = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
    again = torch.autograd.grad(loss, [*model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    del loss
    held = host.held
    for rows in (4, 2, 1, 3):  # shorter rows use the same memory
        model(torch.ones(rows, 8)).sum()
        model(torch.ones(rows, 8)).sum().backward()
    assert host.held == held
    with torch.no_grad():
        model(torch.ones(64, 8))
    model.eval()(torch.ones(64, 8))
    assert host.held == held


def test_what_the_limit_does_not_allow_stays() -> None:
    pieces = HostPieces(torch.device("cpu"), limit=200, piece=64)
    first = pieces.take(65)
    assert first is not None
    assert [len(first), pieces.held] == [2, 128]
    assert pieces.take(128) is None
    pieces.give_back(first)
    assert pieces.take(192) is not None
    host = HostInputs(limit=256, piece=64)
    model = Pairs().train()
    apply_activation_checkpointing(model, "offload")
    offload_inputs(list(model.blocks), host)
    model(torch.ones(4, 8)).sum().backward()
    assert (host.held, host.full) == (256, True)


def test_free_host_memory(tmp_path: Path) -> None:
    """That of the container, if it is less than the machine's."""
    whole = available_host_memory(tmp_path)
    assert whole > 2**20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_host_memory(tmp_path) > 2**20
    (tmp_path / "memory.max").write_text("1048576\n")
    assert available_host_memory(tmp_path) == 1047576


def test_the_ledger_says_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = DDPStrategy(activation_checkpointing="offload")
    facts = fit(tiny_model(num_hidden_layers=2), Ledger(), tmp_path, strategy=strategy).facts
    assert facts["run"]["offloaded"]["bytes"] == 2 * 16 * 2**20
    assert "inputs of blocks take 32.0 MiB of at most" in " ".join(capsys.readouterr().out.split())
    facts["run"]["offloaded"] |= {"full": True, "results": "some"}
    assert "inputs of blocks and some results of attention take" in dict(ledger_rows(facts))["host memory"]
    assert dict(ledger_rows(facts))["host memory"].endswith(", and what is over stays on the device")


@pytest.mark.parametrize(("free", "ranks", "usable"), [(96, 1, 64), (96, 2, 32), (240, 1, 192), (1024, 8, 122)])
def test_usable_host_memory(free: int, ranks: int, usable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """GiB: a third stays for others, and of a large host 48."""
    monkeypatch.setattr(host_memory, "available_host_memory", lambda: free * 2**30)
    assert usable_host_memory(ranks) == usable * 2**30
