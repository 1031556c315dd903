"""QLoRA: a base in 4 bits on one rank and in shards, and low-bit optimizer state in checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from automodel_trainer import AutoModelForCausalLM, CausalLMModule, MockDataModule, Trainer
from automodel_trainer.checkpoint.optimizer import load_optimizers, snapshot_optimizers
from automodel_trainer.models.lora import LoRAConfig, adapters
from automodel_trainer.models.lora.adapter_files import save_adapter
from automodel_trainer.models.quantization import quantize
from automodel_trainer.models.quantization.quantize import is_quantized
from automodel_trainer.modules.optim import OptimizerConfig, build_optimizer
from tests.beside import use
from tests.harness import NextToken, close, make_strategy, random_rows
from tests.matrix import more
from tests.models.test_lora_layouts import train
from tests.pool import RankPool
from tests.test_trainer import Curve, quiet
from tests.tiny import tiny_model

IDS = torch.arange(6, 70).view(2, 32)


@pytest.fixture(autouse=True)
def _torchao() -> None:
    use("torchao")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qlora")
    tiny_model("llama").save_pretrained(folder)
    return folder


def with_libraries(names: list[str], function: Any, *args: Any) -> Any:
    """`function` on a rank of the pool."""
    use(*names)
    return function(*args)


def test_base_is_packed_and_near_what_it_was(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, lora=LoRAConfig(rank=4, quantize="nf4"))
    plain = tiny_model("llama")
    for adapter in adapters(model):
        weight = adapter.module.weight
        assert is_quantized(weight)
        assert not weight.requires_grad
        exact = plain.get_submodule(adapter.target).weight
        block = exact.reshape(-1, 64).abs().amax(dim=1, keepdim=True)
        error = (whole_dense(weight) - exact).reshape(-1, 64).abs() / block  # type: ignore[arg-type]
        assert error.max() < 0.16  # half of the widest gap between two levels, and the rounding of the scales
        packed = weight.parts.codes.nbytes + weight.parts.scales.nbytes  # type: ignore[union-attr]
        assert packed <= 0.6 * weight.numel()
    assert not is_quantized(model.lm_head.weight)
    assert (model(IDS).logits - plain(IDS).logits).abs().mean() < 0.05


def whole_dense(weight: torch.Tensor) -> torch.Tensor:
    return weight.get_original_weight()  # type: ignore[attr-defined]


def test_gradients_are_those_of_the_unpacked_base(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, lora=LoRAConfig(rank=4, quantize="nf4"))
    plain = AutoModelForCausalLM.from_pretrained(base, lora=LoRAConfig(rank=4))
    for packed, full in zip(adapters(model), adapters(plain)):
        full.module.weight.data = whole_dense(packed.module.weight)  # type: ignore[arg-type, union-attr]
        for adapter in (packed, full):
            torch.nn.init.constant_(adapter.b.weight, 0.02)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    for one in (model, plain):
        one(IDS).logits.square().mean().backward()
    for packed, full in zip(adapters(model), adapters(plain)):
        close(packed.a.weight.grad, full.a.weight.grad)
        close(packed.b.weight.grad, full.b.weight.grad)


@pytest.mark.parametrize(
    ("precision", "dora", "layouts"),
    [
        ("fp32", False, [("ddp", 2), ("fsdp2", 4)]),
        ("fp32", True, [("fsdp2", 2)]),
        ("bf16", False, [("fsdp2", 2)]),
        more("fp32", False, [("fsdp2", 2), ("hsdp:dp_replicate=2", 4)]),
    ],
)
def test_ranks(pool: RankPool, base: Path, precision: str, dora: bool, layouts: list[tuple[str, int]]) -> None:
    lora = {"quantize": "nf4", "use_dora": dora}
    tight = 1e-5 if precision == "fp32" else 2e-3
    one = pool.run(1, with_libraries, ["torchao"], train, "fsdp2", 1, precision, base, lora)[0]
    for spec, world_size in layouts:
        for result in pool.run(world_size, with_libraries, ["torchao"], train, spec, world_size, precision, base, lora):
            assert result["losses"] == pytest.approx(one["losses"], rel=tight)
    exact = pool.run(1, train, "fsdp2", 1, precision, base, {"use_dora": dora})[0]
    assert one["losses"] != exact["losses"]
    assert one["losses"] == pytest.approx(exact["losses"], rel=0.02)


def fit_an_object(spec: str, world: int, root: Path, quantize: str | None = "nf4") -> list[float]:
    """Losses of a model that is given as an object, through the whole Trainer."""
    curve = Curve()
    size = 2 // world
    data = MockDataModule(vocab_size=260, seq_len=24, micro_batch_size=size, global_batch_size=8, num_samples=40)
    given = CausalLMModule(tiny_model("llama"), lora=LoRAConfig(rank=4, quantize=quantize), lr=1e-2)
    Trainer(**quiet(root, strategy=spec, devices=world, max_steps=4, callbacks=[curve])).fit(given, data)
    assert quantize is None or any(map(is_quantized, given.model.parameters()))
    return [row["train_loss"] for row in curve.rows]


def test_a_model_that_is_real_is_quantized_after_it_is_sharded(pool: RankPool, tmp_path: Path) -> None:
    one = pool.run(1, with_libraries, ["torchao"], fit_an_object, "fsdp2", 1, tmp_path / "one")[0]
    for losses in pool.run(2, with_libraries, ["torchao"], fit_an_object, "fsdp2", 2, tmp_path / "two"):
        assert losses == pytest.approx(one, rel=1e-5)
    exact = pool.run(1, fit_an_object, "fsdp2", 1, tmp_path / "exact", None)[0]
    assert one != exact
    assert one == pytest.approx(exact, rel=0.02)


def test_one_weight_at_a_time(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a weight is quantized, all before it are quantized already and none after it has been read."""
    events: list[int] = []
    original = quantize.quantized

    def quantized(weight: torch.Tensor, scheme: str) -> torch.nn.Parameter:
        events.append(sum(not w.is_meta and not is_quantized(w) for w in quantize.quantized_weights(models[0])))
        return original(weight, scheme)

    models: list[Any] = []
    prepare = quantize.prepare_quantization
    monkeypatch.setattr(quantize, "quantized", quantized)
    monkeypatch.setattr(
        "automodel_trainer.models.lora.apply.prepare_quantization",
        lambda model, *args: (models.append(model), prepare(model, *args)),
    )
    AutoModelForCausalLM.from_pretrained(base, lora=LoRAConfig(rank=4, quantize="nf4"))
    assert events == [0] * 14


def test_the_adapter_is_saved_without_the_base(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, lora=LoRAConfig(rank=4, quantize="nf4"))
    save_adapter(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(base, lora=LoRAConfig(adapter=str(tmp_path), quantize="nf4"))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_bad_input(base: Path, tmp_path: Path) -> None:
    tiny_model("llama", intermediate_size=65).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"not a multiple of 64. Leave it out with exclude"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "odd", lora=LoRAConfig(quantize="nf4"))


def test_scale_blocks_do_not_depend_on_the_ranks() -> None:
    for shape in ((4096, 4096), (576, 576), (1536, 576), (192, 576)):
        sizes = {quantize._scale_block(torch.Size(shape), shards) for shards in (1, 2, 4, 8)}
        assert len(sizes) == 1
    assert quantize._scale_block(torch.Size((4096, 4096))) == 256
    with pytest.raises(ValueError, match="not a multiple of"):
        quantize._scale_block(torch.Size((6, 32)), 6)


def low_bit(name: str, folder: Path, world_size: int, halves: bool) -> list[float]:
    """Six steps of a low-bit optimizer; with `halves`, saved after three and read into a new one."""
    use("torchao")
    torch.compiler.set_stance("force_eager")  # it compiles its step, for half a minute
    strategy = make_strategy("fsdp2", world_size)
    config = tiny_model("llama", hidden_size=128, intermediate_size=256).config
    model = AutoModelForCausalLM.from_config(
        config, strategy, lora=LoRAConfig(rank=64, target_modules=["up_proj"])
    ).train()
    optimizer = build_optimizer(OptimizerConfig(f"torchao.optim.{name}"), model, 1e-2)
    losses = []
    for step in range(6):
        if halves and step == 3:
            snapshot_optimizers(model, [optimizer]).write(folder)
            torch.distributed.barrier()
            optimizer = build_optimizer(OptimizerConfig(f"torchao.optim.{name}"), model, 1e-2)
            load_optimizers(model, [optimizer], folder)
        mine = random_rows(4, 24, seed=0)[strategy.dp_rank :: strategy.dp_size]
        tokens = strategy.sum_over_rows(torch.stack([(row["labels"][:, 1:] != -100).sum() for row in mine]).sum())
        loss = strategy.forward_backward(NextToken(model), mine, tokens)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((strategy.sum_over_tokens(loss) / tokens).item())
    torch.compiler.set_stance("default")
    packed = [v for state in optimizer.state.values() for v in state.values() if "Optim" in type(_local(v)).__name__]
    assert packed
    return losses


def _local(value: Any) -> Any:
    return getattr(value, "_local_tensor", value)


@pytest.mark.parametrize(("name", "world_size"), [("AdamW8bit", 2), ("AdamW4bit", 1), ("AdamW4bit", 2)])
def test_low_bit_optimizers_resume_bit_for_bit(pool: RankPool, tmp_path: Path, name: str, world_size: int) -> None:
    straight = pool.run(world_size, low_bit, name, tmp_path, world_size, False)[0]
    halves = pool.run(world_size, low_bit, name, tmp_path, world_size, True)[0]
    assert halves == straight
    assert straight[-1] < straight[0]
    assert all(math.isfinite(loss) for loss in straight)
