"""Compiled blocks: the same numbers, one compiled function for all blocks, checkpointing inside, refusals."""

from __future__ import annotations

import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from automodel_trainer import CausalLMModule, Trainer
from automodel_trainer.strategies import DDPStrategy, FSDP2Strategy, MegatronFSDPStrategy
from automodel_trainer.strategies.base import compile, mesh_strategy
from automodel_trainer.strategies.base.compile import compile_blocks
from automodel_trainer.strategies.tensor import collectives
from tests.harness import check_steps, close, make_strategy, random_rows, stack
from tests.matrix import more
from tests.pool import RankPool
from tests.strategies.test_parity import reference, train
from tests.test_trainer import quiet
from tests.tiny import tiny_model

COMPILED = "compile=true,compile_backend=aot_eager"


@pytest.mark.parametrize("spec", [more("auto"), more("ddp"), "fsdp2:activation_checkpointing=full"])
def test_one_device(spec: str) -> None:
    separator = "," if ":" in spec else ":"
    check_steps(train(f"{spec}{separator}{COMPILED}", 1, 4, "llama", tied=True), reference("llama", tied=True))


@pytest.mark.parametrize(
    ("spec", "family"),
    [
        more("fsdp2", "llama"),
        ("fsdp2:activation_checkpointing=selective", "gemma3_text"),  # windows and full attention
        more("fsdp2:tp=2", "llama"),
        more("fsdp2:tp=2,activation_checkpointing=full", "qwen3"),
        ("fsdp2:tp=2,activation_checkpointing=selective", "qwen3"),
        ("fsdp2:tp=2,sequence_parallel=false,activation_checkpointing=full", "phi3"),
    ],
)
def test_ranks(pool: RankPool, spec: str, family: str) -> None:
    """All blocks share one graph."""
    separator = "," if ":" in spec else ":"
    for graphs, breaks, result in pool.run(2, train_and_count, f"{spec}{separator}{COMPILED}", family):
        assert (graphs, breaks) == (1, 0)
        check_steps(result, reference(family, tied=False))


def train_and_count(spec: str, family: str) -> tuple[int, int, Any]:
    """Graphs that training two micro-batches compiled, times that dynamo gave up on a piece of code, and the run."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    result = train(spec, 2, 4, family, False)
    counters: Any = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), result


def collective_gradients(rows: int) -> dict[str, float]:
    """How far compiled collectives, forward and backward, are from those that are not."""
    group = make_strategy("fsdp2:tp=2", 2).device_mesh["tp"].get_group()
    x = torch.randn(rows, 4, 8, generator=torch.Generator().manual_seed(group.rank()))
    functions = {
        "gather, full": lambda x: collectives.gather_sequence(2 * x, group, 8),
        "gather, partial": lambda x: collectives.gather_sequence(2 * x, group, 8, partial=True),
        "gather, padded": lambda x: collectives.gather_sequence(2 * x, group, 7, partial=True),
        "reduce-scatter": lambda x: collectives.reduce_scatter_sequence(2 * x, group),
        "slice": lambda x: collectives.slice_sequence(2 * x, group),
        "all-reduce": lambda x: collectives.all_reduce(2 * x, group),
        "sum of gradients": lambda x: 2 * collectives.sum_gradient(2 * x, group),
        "gather features": lambda x: collectives.gather_features(2 * x, group, 16),
        "slice features": lambda x: collectives.slice_features(2 * x, group),
    }
    far = {}
    for name, function in functions.items():
        results = []
        for run in (function, torch.compile(function, backend="aot_eager")):
            leaf = x.clone().requires_grad_()
            out = run(leaf)
            (out * torch.arange(out.numel()).view_as(out)).sum().backward()
            assert leaf.grad is not None
            results.append(torch.cat([out.detach().flatten(), leaf.grad.flatten()]))
        far[name] = float((results[0] - results[1]).norm() / results[0].norm())
    return far


@pytest.mark.parametrize("rows", [1, more(2)])
def test_compiled_collectives_have_the_same_gradients(pool: RankPool, rows: int) -> None:
    """With one row a part of a sequence is a view of the whole, whose gradient torch 2.11 lost."""
    for far in pool.run(2, collective_gradients, rows):
        assert max(far.values()) < 1e-6, far


class Counted(torch.nn.Module):
    """An activation function that counts how often it is computed."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x)


def count_calls(spec: str, world_size: int) -> int:
    torch._dynamo.reset()
    strategy = make_strategy(spec, world_size)
    model = tiny_model("llama", num_hidden_layers=1).train()
    counted = model.model.layers[0].mlp.act_fn = Counted(model.model.layers[0].mlp.act_fn)
    model = strategy.parallelize(model)
    model(input_ids=torch.arange(8)[None], use_cache=False).logits.sum().backward()
    return counted.calls


@pytest.mark.parametrize("spec", ["fsdp2", f"fsdp2:{COMPILED}", "fsdp2:tp=2", "fsdp2:cpu_offload=true"])
def test_checkpointing_recomputes(pool: RankPool, spec: str) -> None:
    """What a block computes is computed once more in backward, and once only without checkpointing."""
    separator = "," if ":" in spec else ":"
    assert pool.run(2, count_calls, spec, 2) == [1, 1]
    assert pool.run(2, count_calls, f"{spec}{separator}activation_checkpointing=full", 2) == [2, 2]


def test_frozen_embeddings_need_no_graph_of_their_own() -> None:
    """Behind them the first block gets an input without a gradient. A frozen block keeps it so."""
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = tiny_model("llama", num_hidden_layers=3).train()
    model.model.embed_tokens.requires_grad_(False)
    ids = torch.arange(8)[None]
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compile_blocks(model, backend)
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert len(compiled) == 1
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        close(gradient, expected[name])
    assert not model.requires_grad_(False)(input_ids=ids, use_cache=False).logits.requires_grad


def test_blocks_that_train_something_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained may change between calls; frozen blocks, which are asked at each, do not walk their modules."""
    given: list[Any] = []
    monkeypatch.setattr(compile, "_with_gradient", lambda x: given.append(x) or x)
    model = tiny_model("llama", num_hidden_layers=3).train().requires_grad_(False)
    compile_blocks(model, "eager")
    for block in model.model.layers:
        block.forward.compiled = lambda forward, *args, **kwargs: forward(*args, **kwargs)
    ids = torch.arange(8)[None]
    model(input_ids=ids, use_cache=False)
    assert not given
    model.model.layers[0].mlp.requires_grad_(True)
    monkeypatch.setattr(torch.nn.Module, "modules", None)
    model(input_ids=ids, use_cache=False)
    assert len(given) == 1
    monkeypatch.undo()


def test_evaluation_is_not_compiled() -> None:
    model = tiny_model("llama").eval()
    ids = torch.arange(8)[None]
    expected = model(input_ids=ids).logits

    def fail(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    compile_blocks(model, fail)
    close(model(input_ids=ids).logits, expected)
    with torch.no_grad():  # other libraries generate so, in training mode
        close(model.train()(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("backend", "given", "passed"),
    [
        ("inductor", None, {"use_fast_math": True}),
        ("inductor", {}, {}),
        ("inductor", {"max_autotune": True}, {"max_autotune": True}),
        ("aot_eager", None, None),
    ],
)
def test_options(monkeypatch: pytest.MonkeyPatch, backend: str, given: Any, passed: Any) -> None:
    calls, real = [], torch.compile

    def compile(function: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        real(function, **kwargs)  # which knows the options of this torch
        return function

    monkeypatch.setattr(torch, "compile", compile)
    strategy = make_strategy("ddp", 1)
    strategy.compile, strategy.compile_backend, strategy.compile_options = True, backend, given
    monkeypatch.setattr(type(strategy), "compiles", True)
    model = tiny_model("llama").train()
    strategy.compile_model(model)
    # Its own options are right, and `torch.compile` then imports all of the inductor: it waits for the first call.
    assert len(calls) == ((backend, given) != ("inductor", None))
    model(input_ids=torch.arange(8)[None])
    assert calls == [{"backend": backend, "options": passed}]


def test_the_compiler_is_imported_beside_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread that has ended when the weights are there. It never raises: the first compiled call does."""
    seen: list[Any] = []

    def import_compiler() -> None:
        seen.append((threading.current_thread(), torch._inductor.config.max_autotune))
        raise ImportError("no compiler")

    monkeypatch.setattr(compile, "import_compiler", import_compiler)
    with compile.compiler_imported(False):
        pass
    with torch._inductor.config.patch(max_autotune=True), compile.compiler_imported(True):
        pass
    ((thread, autotunes),) = seen
    assert thread is not threading.current_thread()
    assert not thread.is_alive()
    assert autotunes
    with pytest.raises(RuntimeError, match="of the weights"), compile.compiler_imported(True):
        raise RuntimeError("of the weights")


def test_what_is_imported() -> None:
    """Under this torch, and on no device."""
    compile.import_compiler()
    assert "torch._inductor.compile_fx" in sys.modules
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(("backend", "imports"), [("inductor", [False, True]), ("aot_eager", [False, False])])
def test_runs_that_train_import_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, imports: list[bool]
) -> None:
    """Before the weights are there. The blocks of this run then compute without a compiler."""
    asked: list[bool] = []

    def imported(wanted: bool) -> Any:
        asked.append(wanted)
        return nullcontext()

    monkeypatch.setattr(mesh_strategy, "compiler_imported", imported)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    data = [[stack(random_rows(2, 8, 0))]]
    for compiles in (False, True):
        monkeypatch.setattr(DDPStrategy, "compiles", compiles)
        trainer = Trainer(**quiet(tmp_path, max_steps=1, strategy=f"ddp:compile_backend={backend}"))
        trainer.validate(CausalLMModule(tiny_model("llama")), data)
        trainer.fit(CausalLMModule(tiny_model("llama")), data)
    assert asked == imports


@pytest.mark.parametrize("strategy", [DDPStrategy, FSDP2Strategy, MegatronFSDPStrategy])
def test_strategies_take_options(strategy: Any) -> None:
    assert strategy().compile_options is None
    assert strategy(compile_options={"max_autotune": True}).compile_options == {"max_autotune": True}


def test_refusals(pool: RankPool) -> None:
    with pytest.raises(ValueError, match="compile=True makes GPU kernels, and this run is on cpu"):
        train("fsdp2:compile=true", 1, 4, "llama", tied=True)
    with pytest.raises(ValueError, match="compile='yes' is unknown"):
        train("fsdp2:compile='yes'", 1, 4, "llama", tied=True)
    selective = f"fsdp2:tp=2,cp=2,activation_checkpointing=selective,{COMPILED}"
    with pytest.raises(AssertionError, match=r"'selective' needs blocks .* in one piece"):
        pool.run(4, count_calls, selective, 4)
    with pytest.raises(ValueError, match="no list of blocks"):
        compile_blocks(torch.nn.Linear(2, 2))


def test_async_tp_is_refused_where_it_cannot_be(pool: RankPool) -> None:
    with pytest.raises(ValueError, match=r"async_tp=True needs tp > 1 .* and GPUs .* on cpu\) and compile=True\. "):
        train("fsdp2:async_tp=true", 1, 4, "llama", tied=True)
    with pytest.raises(AssertionError, match=r"async_tp=True needs GPUs .* and sequence_parallel=True"):
        pool.run(2, count_calls, f"fsdp2:tp=2,async_tp=true,sequence_parallel=false,{COMPILED}", 2)
