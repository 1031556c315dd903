"""fp8 layers, emulated on a CPU, against the same model without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from automodel_trainer.models import kernels
from automodel_trainer.models.fp8 import RECIPES, convert_to_fp8, fp8_layers
from automodel_trainer.models.kernels import KernelsConfig, apply_kernels
from automodel_trainer.models.lora import LoRAConfig, apply_lora, finish_lora
from tests.beside import use
from tests.harness import full, relative_error
from tests.pool import RankPool
from tests.strategies.test_parity import train as train_on_ranks
from tests.tiny import tiny_model

CPU = torch.device("cpu")
# a value of e4m3 (3 bits of mantissa) is off by up to 1/16; tensorwise casts gradients to e5m2 (2 bits): up to 1/8
TOLERANCE = {"tensorwise": 0.12, "rowwise": 0.06, "rowwise_with_gw_hp": 0.06}


@pytest.fixture(autouse=True)
def _torchao() -> None:
    use("torchao")


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(5, 260, (4, 32), generator=torch.Generator().manual_seed(0))
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


def test_adapters_on_fp8_layers() -> None:
    """LoRA is mixed into the fp8 layer: its base multiplies in fp8, its factors do not and are all that is trained."""
    model = tiny_model("llama")
    convert_to_fp8(model, "tensorwise", CPU, emulate=True)
    plain = step(tiny_model("llama"))[0]
    apply_lora(model, LoRAConfig(rank=4))
    finish_lora(model)
    loss, gradients = step(model)
    assert loss == pytest.approx(plain.item(), rel=1e-3)
    assert loss != plain
    assert gradients
    assert all("lora_" in name for name in gradients)


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
    expected = sharded("auto", 1, "llama", False)
    for result in pool.run(2, sharded, "fsdp2", 2, "llama", False):
        for got, want in zip(result["history"], expected["history"]):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        for name, gradient in expected["history"][0]["gradients"].items():
            assert relative_error(full(result["history"][0]["gradients"][name]), gradient) < 1e-4, name


def test_the_section_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(kernels, "convert_to_fp8", lambda *args: calls.append(args[1:]))
    apply_kernels(tiny_model("llama"), KernelsConfig(attention="eager", fp8="rowwise"), CPU)
    assert calls == [("rowwise", CPU)]
