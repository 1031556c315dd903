"""MLPs in tiles of tokens: the numbers of the plain path, what is computed how often, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from automodel_trainer.callbacks import Ledger
from automodel_trainer.models.kernels.token_mlps import find_token_mlps
from automodel_trainer.models.lora import LoRAConfig, apply_lora, finish_lora
from automodel_trainer.nn.tiles import TILE, tile, tile_length
from automodel_trainer.strategies import DDPStrategy, FSDP2Strategy
from automodel_trainer.strategies.base.activation_checkpointing import apply_activation_checkpointing
from automodel_trainer.strategies.base.compile import compile_blocks, compiled_call
from tests.callbacks.test_ledger import fit
from tests.harness import NextToken, check_steps, make_strategy, train_steps
from tests.matrix import more
from tests.pool import RankPool
from tests.strategies import pipeline_runs
from tests.strategies.test_compile import COMPILED, Counted
from tests.strategies.test_offload import same
from tests.strategies.test_parity import reference, train
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("spec", "family"),
    [
        ("fsdp2:tiled_mlp=4,activation_checkpointing=full,compile=false", "llama"),
        ("ddp:tiled_mlp=5,compile=false", "gpt_neox"),
        more("ddp:tiled_mlp=5,activation_checkpointing=offload,compile=false", "phi3"),
        more(f"fsdp2:tiled_mlp=3,activation_checkpointing=full,{COMPILED}", "llama"),
        more("fsdp2:tiled_mlp=2,activation_checkpointing=selective,compile=false", "llama"),
    ],
)
def test_one_device(spec: str, family: str) -> None:
    """Against plain torch; the last tile is shorter where the number does not divide the 24 tokens of a row."""
    check_steps(train(spec, 1, 3, family, tied=True), reference(family, tied=True))


@pytest.mark.parametrize(
    ("spec", "world_size", "family"),
    [
        ("fsdp2:tp=2,tiled_mlp=4,activation_checkpointing=offload,compile=false", 2, "llama"),
        more(f"fsdp2:tp=2,tiled_mlp=4,activation_checkpointing=offload,{COMPILED}", 2, "llama"),
        ("fsdp2:tp=2,sequence_parallel=false,tiled_mlp=5,compile=false", 2, "phi3"),
        ("fsdp2:cp=2,tiled_mlp=3,activation_checkpointing=full,compile=false", 2, "qwen3"),
        more("hsdp:dp_replicate=2,tiled_mlp=4,activation_checkpointing=full,compile=false", 4, "gemma3_text"),
        more("ddp:tiled_mlp=4,activation_checkpointing=full,compile=false", 2, "llama"),
    ],
)
def test_ranks(pool: RankPool, spec: str, world_size: int, family: str) -> None:
    """Parts of a sequence are gathered tile by tile."""
    check_steps(pool.run(world_size, train, spec, world_size, 2, family, False), reference(family, tied=False))


def test_pipelines(pool: RankPool) -> None:
    spec = "3d:pp=2,tiled_mlp=3,schedule=interleaved_zero_bubble,compile=false"
    options = {"tie_word_embeddings": False}
    results = pool.run(2, pipeline_runs.train, spec, 2, "llama", **options)
    check_steps(results, pipeline_runs.reference("llama", **options))


def lora_steps(spec: str, dropout: float = 0.0, precision: str = "fp32") -> Any:
    torch.manual_seed(1)
    strategy = make_strategy(spec, 1, precision)
    model = tiny_model("qwen3")
    apply_lora(model, LoRAConfig(rank=4, init="orthogonal", dropout=dropout))
    strategy.parallelize(model.train())
    finish_lora(model)
    return train_steps(strategy, NextToken(model), pipeline_runs.adam(model), pipeline_runs.rows_of, 4, steps=2)


def test_adapters_with_dropout() -> None:
    """Each tile drops in its backward what it dropped in its forward: checkpointing does not change a bit."""
    tiled = "ddp:compile=false,tiled_mlp=3"
    plain = lora_steps(tiled, dropout=0.3)
    assert same(plain, lora_steps(f"{tiled},activation_checkpointing=offload", dropout=0.3))
    assert plain["history"][1]["loss"] != lora_steps(tiled)["history"][1]["loss"]  # it drops something


def gradient(mlp: nn.Module, x: Tensor, direction: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    (mlp(leaf) * direction).sum().backward()
    found = [leaf.grad, *(p.grad for p in mlp.parameters())]
    mlp.zero_grad()
    return found  # type: ignore[return-value]


def test_gradients_of_dropout() -> None:
    """With the mask of the forward, the loss is linear in a bias after the dropout's layer: exact by differences."""
    torch.manual_seed(0)
    model = tiny_model("gpt_neox", hidden_dropout=0.5)
    mlp = find_token_mlps(model)[0].train()
    mlp.add_module("drop", nn.Dropout(0.5))
    plain = mlp.forward
    mlp.forward = lambda x: mlp.drop(plain(x))  # type: ignore[method-assign, operator]
    tile(mlp, 3)
    x, direction = torch.randn(1, 7, 32), torch.randn(1, 7, 32)
    torch.manual_seed(5)
    last: Any = list(mlp.children())[1]
    out = (mlp(x) * direction).sum()
    out.backward()
    found = last.bias.grad.clone()
    with torch.no_grad():
        last.bias[3] += 1.0
    torch.manual_seed(5)
    moved = (mlp(x) * direction).sum()
    assert float((moved - out).detach()) == pytest.approx(float(found[3]), abs=1e-4)


def test_bf16_gradients_are_rounded_once() -> None:
    """Gradients of bf16 weights are added up in fp32: they are as far from exact ones as those of one matmul."""
    torch.manual_seed(0)
    mlp = find_token_mlps(tiny_model("llama"))[0].train()
    x, direction = torch.randn(1, 512, 32), torch.randn(1, 512, 32)
    exact = gradient(mlp.double(), x.double(), direction.double())
    mlp.bfloat16()
    half = x.bfloat16(), direction.bfloat16()
    plain = gradient(mlp, *half)
    tile(mlp, 64)
    tiled = gradient(mlp, *half)
    for good, one, other in zip(exact, plain, tiled):
        assert other.dtype == torch.bfloat16
        assert (other - good).norm() < 1.1 * (one - good).norm()


def test_autocast() -> None:
    torch.manual_seed(0)
    mlp = find_token_mlps(tiny_model("llama"))[0].train()
    x, direction = torch.randn(2, 12, 32), torch.randn(2, 12, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = gradient(mlp, x, direction)
    tile(mlp, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mlp(x.requires_grad_())
    assert out.dtype == torch.bfloat16
    (out * direction).sum().backward()
    assert x.grad is not None
    assert (x.grad - plain[0]).norm() < 1e-2 * plain[0].norm()


def calls(spec: str) -> int:
    strategy = make_strategy(spec, 1)
    model = tiny_model("llama", num_hidden_layers=1).train()
    counted = model.model.layers[0].mlp.act_fn = Counted(model.model.layers[0].mlp.act_fn)
    model = strategy.parallelize(model)
    model(input_ids=torch.arange(8)[None], use_cache=False).logits.sum().backward()
    return counted.calls


def test_a_checkpointed_mlp_is_computed_twice() -> None:
    """As without tiles. Tiles are computed again in their own backward, so the block's recomputation stops there."""
    assert calls("ddp:compile=false,activation_checkpointing=full") == 2
    for mode in ("full", "offload"):
        assert calls(f"ddp:compile=false,tiled_mlp=4,activation_checkpointing={mode}") == 2 * 4
    assert calls("ddp:compile=false,tiled_mlp=4") == 2 * 4


def test_what_is_kept() -> None:
    """The input, and of the activations no more than a tile's at a time."""
    mlp: Any = find_token_mlps(tiny_model("llama"))[0].train()
    widths: list[int] = []
    mlp.down_proj.register_forward_pre_hook(lambda module, args: widths.append(args[0].numel()))
    tile(mlp, 8)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = mlp(torch.randn(1, 64, 32, requires_grad=True))
    assert [tuple(tensor.shape) for tensor in kept] == [(1, 64, 32)]
    out.sum().backward()
    assert widths == [8 * mlp.down_proj.in_features] * 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x).cumsum(1))  # type: ignore[no-any-return]


@pytest.mark.exact
def test_compiled_blocks() -> None:
    """The block is compiled around its MLP, and tiles are compiled by themselves; checkpointed or not."""
    results: list[list[Tensor]] = []
    for tiled, mode in ((False, None), (True, None), (True, "full")):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.ModuleList([Block(), Block()])).train()
        blocks: Any = model[0]
        if tiled:
            compile_blocks(model, "aot_eager")
            for mlp in find_token_mlps(model):
                tile(mlp, 3, compiled_call("aot_eager", None))
        if mode is not None:
            apply_activation_checkpointing(model, mode)  # type: ignore[arg-type]
        x = torch.arange(80.0).reshape(1, 10, 8).div(80).requires_grad_()
        out = blocks[1](blocks[0](x))
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in model.parameters())])  # type: ignore[list-item]
    for other in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(results[0], other))
    assert all(torch.equal(a, b) for a, b in zip(*results[1:]))


@pytest.mark.parametrize(
    ("shape", "count", "length"),
    [
        ((1, 100, 8), 4, 25),
        ((1, 101, 8), 4, 26),
        ((101, 8), 4, 26),
        ((1, 2 * TILE, 8), "auto", 2 * TILE),
        ((1, 2 * TILE + 1, 8), "auto", TILE),
        ((4, TILE, 8), "auto", TILE // 4),
    ],
)
def test_length_of_tiles(shape: tuple[int, ...], count: Any, length: int) -> None:
    assert tile_length(shape, count) == length


def test_found_by_what_they_compute() -> None:
    """Two and three layers, fused ones, and no attention or experts; a module that mixes tokens is none."""
    for family, count in {"llama": 2, "phi3": 2, "gpt_neox": 2, "starcoder2": 2, "mamba": 0}.items():
        assert len(find_token_mlps(tiny_model(family))) == count, family
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    shared = tiny_model("qwen2_moe", shared_expert_intermediate_size=48, **sizes)
    assert len(find_token_mlps(shared)) == 2

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).cumsum(1))  # type: ignore[no-any-return]

    assert not find_token_mlps(nn.Sequential(nn.ModuleList([Mixes()])))


def test_found_inside_of_a_device_context() -> None:
    """Strategies build models there."""
    with torch.device("meta"):
        assert len(find_token_mlps(tiny_model("llama"))) == 2


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"tiled_mlp=1 is unknown\. Allowed: auto, a number of tiles from 2"):
        make_strategy("fsdp2:tiled_mlp=1", 1).parallelize(tiny_model())
    with pytest.raises(ValueError, match="tiled_mlp=4 finds no MLP to tile"):
        make_strategy("ddp:tiled_mlp=4", 1).parallelize(tiny_model("mamba"))
    with pytest.raises(ValueError, match="'selective' needs compiled blocks in one piece"):
        make_strategy(f"fsdp2:tiled_mlp=4,activation_checkpointing=selective,{COMPILED}", 1).parallelize(tiny_model())
    assert FSDP2Strategy(tiled_mlp="auto").tiles is None
    assert FSDP2Strategy(tiled_mlp="auto", activation_checkpointing="offload").tiles == "auto"


def test_the_ledger_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny_model(), Ledger(), tmp_path, strategy=DDPStrategy(tiled_mlp=2))
    assert "2 MLPs in 2 tiles" in " ".join(capsys.readouterr().out.split())
