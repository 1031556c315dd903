"""fp8 layers, emulated on a CPU, against the same model without them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from automodel_trainer import AutoModelForCausalLM
from automodel_trainer.models.kernels import choose as kernels
from automodel_trainer.models.kernels.choose import KernelsConfig, apply_kernels
from automodel_trainer.models.kernels.fp8 import RECIPES, convert_to_fp8
from automodel_trainer.models.lora import LoRAConfig, adapters, apply_lora, finish_lora
from automodel_trainer.models.quantization import fp8_weight
from automodel_trainer.models.quantization.fp8_layers import fp8_layers
from automodel_trainer.models.quantization.fp8_weight import E4M3, E5M2, cast_with, dequantize, scale_of
from automodel_trainer.models.quantization.quantize import is_quantized
from automodel_trainer.models.quantization.quantized_tensor import quantize
from automodel_trainer.strategies.base.compile import compile_blocks
from tests.beside import use
from tests.harness import close, relative_error
from tests.limits import check_casts
from tests.matrix import more
from tests.models.test_lora_layouts import train as train_lora
from tests.models.test_lora_peft import disturb
from tests.pool import RankPool
from tests.strategies.test_parity import reference
from tests.strategies.test_parity import train as train_on_ranks
from tests.tiny import tiny_model

CPU = torch.device("cpu")
# a value of e4m3 (3 bits of mantissa) is off by up to 1/16; tensorwise casts gradients to e5m2 (2 bits): up to 1/8
TOLERANCE = {"tensorwise": 0.12, "rowwise": 0.06, "rowwise_with_gw_hp": 0.06}


@pytest.fixture(autouse=True)
def _torchao() -> None:
    use("torchao")


def step(model: Any, shape: tuple[int, int] = (4, 32)) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(5, 260, shape, generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", RECIPES)
def test_close_to_full_precision(recipe: str) -> None:
    """The loss, and the gradients together, within what fp8 leaves of them; not equal, or nothing was converted."""
    loss, gradients = step(tiny_model("qwen3"))
    model = tiny_model("qwen3")
    layers = convert_to_fp8(model, recipe, CPU, emulate=True)
    assert len(layers.converted) == 14
    assert not layers.left
    assert fp8_layers(model) is layers
    ours, found = step(model)
    assert model.state_dict().keys() == tiny_model("qwen3").state_dict().keys()
    assert ours == pytest.approx(loss.item(), rel=1e-3)
    assert ours != loss
    together = [torch.cat([g[name].flatten() for name in gradients]) for g in (found, gradients)]
    assert 1e-4 < relative_error(*together) < TOLERANCE[recipe]


def adapted(recipe: str, layers: int = 2, **lora: Any) -> Any:
    """A tiny model with adapters that do something, its frozen weights in fp8."""
    model = tiny_model("llama", num_hidden_layers=layers, use_cache=False)
    apply_lora(model, LoRAConfig(rank=4, **lora))
    converted = convert_to_fp8(model, recipe, CPU, emulate=True)
    finish_lora(model)
    disturb(model)
    assert converted.frozen
    return model


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_frozen_weights_are_cast_once(recipe: str) -> None:
    """Adapters train on weights of one byte a number; loss and gradients as far from fp32's as fp8 allows."""
    plain = tiny_model("llama")
    apply_lora(plain, LoRAConfig(rank=4))
    finish_lora(plain)
    disturb(plain)
    model = adapted(recipe)
    for adapter in adapters(model):
        weight = adapter.module.weight
        assert is_quantized(weight)
        assert sum(getattr(weight.parts, part).nbytes for part in ("codes", "scales")) <= 1.2 * weight.numel()
        exact = plain.get_submodule(adapter.target).weight
        assert 1e-3 < relative_error(weight.get_original_weight(), exact) < 0.04
        assert not is_quantized(adapter.a.weight)
    expected, wanted = step(plain)
    loss, gradients = step(model)
    assert loss == pytest.approx(expected.item(), rel=2e-3)
    assert gradients.keys() == wanted.keys()
    together = [torch.cat([g[name].flatten() for name in wanted]) for g in (gradients, wanted)]
    assert 1e-3 < relative_error(*together) < 1.5 * TOLERANCE[recipe]  # a narrow model's few numbers
    assert "14 linear layers in fp8" in str(fp8_layers(model))
    assert "14 weights held in fp8" in str(fp8_layers(model))


@pytest.mark.parametrize(
    ("recipe", "backend"), [("tensorwise", "aot_eager"), ("rowwise", "aot_eager"), more("rowwise", "inductor")]
)
def test_compiled_blocks_compute_the_same(recipe: str, backend: str) -> None:
    expected, wanted = step(adapted(recipe, layers=1).train())
    model = adapted(recipe, layers=1).train()
    compile_blocks(model, backend)
    loss, gradients = step(model)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    # a number that falls on the other side of a rounding is one step of fp8 away
    assert max(relative_error(gradients[name], wanted[name]) for name in wanted) < 0.02


def test_the_product_of_codes_is_what_dense_arithmetic_says() -> None:
    """Against fp64 products of the numbers that the codes stand for: the matmul and its gradient add no error."""
    generator = torch.Generator().manual_seed(1)
    weight, x = (torch.randn(48, 32, generator=generator), torch.randn(3, 5, 32, generator=generator))
    packed = quantize(weight, "fp8-rowwise", 0)
    x.requires_grad_()
    out = F.linear(x, packed, torch.ones(48))
    rows = x.detach().flatten(0, 1)
    cast = dequantize(fp8_weight.quantize(rows, "fp8-rowwise"), torch.float64)
    dense = packed.get_original_weight().double()
    close(out.flatten(0, 1).detach(), cast @ dense.T + 1)
    gradient = torch.randn(3, 5, 48, generator=generator)
    out.backward(gradient)
    assert x.grad is not None
    assert relative_error(x.grad.flatten(0, 1).double(), gradient.flatten(0, 1).double() @ dense) < 0.04


def test_compiled_code_is_looked_up_by_layout_and_packing() -> None:
    weight = torch.randn(32, 16)
    packed = [quantize(w, packing, 0) for packing in fp8_weight.SCHEMES for w in (weight, -weight)]
    keys = [tensor._stable_hash_for_caching() for tensor in packed]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert quantize(weight.T.contiguous(), fp8_weight.SCHEMES[0], 0)._stable_hash_for_caching() not in keys


def test_streamed_weights_are_cast_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = functools.partial(convert_to_fp8, emulate=True)
    monkeypatch.setattr(kernels, "convert_to_fp8", emulated)
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, lora=LoRAConfig(rank=4), kernels=KernelsConfig(fp8="rowwise", attention="eager")
    )
    disturb(model)
    wanted = dict(adapted("rowwise").named_parameters())
    cast = {name: weight for name, weight in model.named_parameters() if hasattr(weight, "get_original_weight")}
    assert len(cast) == 14
    for name, weight in cast.items():
        assert torch.equal(weight.get_original_weight(), wanted[name].get_original_weight())
    assert relative_error(step(model)[0], step(adapted("rowwise"))[0]) < TOLERANCE["rowwise"]
    with pytest.raises(ValueError, match="lora init='pissa' would change them"):
        adapted("rowwise", init="pissa")


def train_emulated(base: Path, spec: str, world_size: int) -> dict[str, Any]:
    before, kernels.convert_to_fp8 = kernels.convert_to_fp8, functools.partial(convert_to_fp8, emulate=True)
    try:
        return train_lora(spec, world_size, "fp32", base, {}, KernelsConfig(fp8="rowwise", attention="eager"))
    finally:
        kernels.convert_to_fp8 = before


def test_shards_of_frozen_fp8_weights(pool: RankPool, tmp_path: Path) -> None:
    """They are sharded and gathered as bytes, and train as on one device; tensor parallel refuses them."""
    tiny_model("llama").save_pretrained(tmp_path)
    one = pool.run(1, train_emulated, tmp_path, "auto", 1)[0]
    for spec, world_size in (("fsdp2", 2), ("ddp", 2)):
        for result in pool.run(world_size, train_emulated, tmp_path, spec, world_size):
            assert result["losses"] == pytest.approx(one["losses"], rel=1e-4)
            assert result["norms"] == pytest.approx(one["norms"], rel=2e-2)
    with pytest.raises(Exception, match="tensor parallel cannot cut it"):
        pool.run(2, train_emulated, tmp_path, "fsdp2:tp=2", 2)


def test_layers_that_do_not_suit_are_named() -> None:
    model = tiny_model("llama", intermediate_size=72)
    layers = convert_to_fp8(model, "rowwise", CPU, emulate=True)
    assert len(layers.converted) == 8
    assert layers.left["model.layers.1.mlp.down_proj"] == "32 × 72"
    assert "8 linear layers in fp8 (rowwise); not model.layers.0.mlp.gate_proj (72 × 32)" in str(layers)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"fp8='e5m2' is unknown\. Allowed: tensorwise, rowwise"):
        convert_to_fp8(tiny_model("llama"), "e5m2", CPU)
    with pytest.raises(ValueError, match="fp8='rowwise' needs an NVIDIA GPU"):
        apply_kernels(tiny_model("llama"), KernelsConfig(fp8="rowwise"), CPU)
    small = tiny_model("llama", hidden_size=36, head_dim=10, intermediate_size=72)
    with pytest.raises(ValueError, match=r"would change nothing: .* multiples of 16 \(model\.layers\.0\..*: 40 × 36"):
        convert_to_fp8(small, "rowwise", CPU, emulate=True)


def sharded(spec: str, world_size: int, family: str, tied: bool) -> Any:
    use("torchao")
    import tests.strategies.test_parity as parity

    def converted(*args: Any, **kwargs: Any) -> Any:
        model = tiny_model(*args, **kwargs)
        convert_to_fp8(model, "rowwise_with_gw_hp", CPU, emulate=True)
        return model

    before, parity.tiny_model = parity.tiny_model, converted
    try:
        return train_on_ranks(spec, world_size, 4, family, tied)
    finally:
        parity.tiny_model = before


def test_shards_compute_what_one_device_does(pool: RankPool) -> None:
    """With scales by rows and gradients of weights in full precision nothing depends on how a batch is cut."""
    expected, exact = sharded("auto", 1, "llama", False), reference("llama", tied=False)
    for result in pool.run(2, sharded, "fsdp2", 2, "llama", False):
        check_casts(result, expected, exact, 8 * 24)


def test_the_section_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(kernels, "convert_to_fp8", lambda *args, **options: calls.append((*args[1:], options)))
    apply_kernels(tiny_model("llama"), KernelsConfig(attention="eager", fp8="rowwise"), CPU)
    ((recipe, device, options),) = calls
    assert (recipe, device, options["all_gather"]) == ("rowwise", CPU, "auto")
    alike = {frozenset(name.rpartition(".")[2] for name in group) for group in options["together"]}
    assert {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"})} <= alike


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("by_row", [False, True], ids=["tensorwise", "rowwise"])
def test_the_largest_number_fits_in_without_a_limit(dtype: torch.dtype, by_row: bool) -> None:
    """Of rows of any size; what does not fit becomes NaN where a cast does not saturate."""
    torch.manual_seed(0)
    sizes = torch.logspace(-11, 15, 500)[:, None]
    x = torch.randn(500, 64) * (sizes if by_row else 1e5)
    codes = cast_with(x, scale_of([x], dtype, by_row), dtype).float()
    largest = codes.abs().amax(1) if by_row else codes.abs().amax()[None]
    assert largest.eq(torch.finfo(dtype).max).all()
