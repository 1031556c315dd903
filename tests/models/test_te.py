"""TransformerEngine's place in a model, with a stand-in for it: swaps, names, checkpoints, adapters, refusals."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from automodel_trainer import AutoModelForCausalLM
from automodel_trainer.models.kernels import KernelsConfig, apply_kernels, attention, kernels_in_use
from automodel_trainer.models.kernels.libraries import _transformer_engine
from automodel_trainer.models.kernels.libraries._transformer_engine import TRANSFORMER_ENGINE
from automodel_trainer.models.kernels.library import Offer
from automodel_trainer.models.kernels.linear import SwappedLinear, swap_linear_layers
from automodel_trainer.models.lora import LoRAConfig, apply_lora, finish_lora
from automodel_trainer.models.quantization.fp8_layers import fp8_layers
from automodel_trainer.strategies.base.activation_checkpointing import apply_activation_checkpointing
from automodel_trainer.strategies.base.compile import compile_blocks
from tests.beside import use
from tests.harness import check_step, check_steps, close, relative_error
from tests.models import transformer_engine_stand_in as stand_in
from tests.pool import RankPool
from tests.strategies.test_parity import reference
from tests.tiny import tiny_model

GPU = torch.device("cuda")
ALL = KernelsConfig(attention="te", norm="te", linear="te")


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch)


def step(model: Any, rows: int = 4, length: int = 32) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(5, 260, (rows, length), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "qwen2", "nemotron", "gpt_neox"])
def test_the_same_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of every kind, linear layers with and without bias, and attention; loss, gradients and names are kept."""
    monkeypatch.setattr(attention, "_HALF", (torch.float32,))
    monkeypatch.setitem(TRANSFORMER_ENGINE.offers, "attention", Offer(dtypes=(torch.float32,)))  # type: ignore[arg-type]
    options: dict[str, Any] = {"attn_implementation": "sdpa"}
    plain, model = (tiny_model(family, **options) for _ in range(2))
    for m in (plain, model):  # norms that begin as ones would hide whose weight is used
        for i, parameter in enumerate(m.parameters()):
            torch.nn.init.normal_(parameter, std=0.1 + 0.01 * (i % 3))
        m.train()
    model.load_state_dict(plain.state_dict())
    names = list(model.state_dict())
    apply_kernels(model, ALL, GPU)
    used = kernels_in_use(model).texts
    assert "TransformerEngine" in used["norm"]
    assert "TransformerEngine" in used["linear"]
    assert "not " not in used["norm"]
    called: list[str] = []
    causal = _transformer_engine.causal_attention
    monkeypatch.setattr(_transformer_engine, "causal_attention", lambda *a: (called.append("te"), causal(*a))[1])
    check_step(step(model), step(plain), 128)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert called == ["te", "te"]


def test_attention_that_it_does_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 is refused; rows with padding attend through sdpa, and that is said."""
    plain, model = (tiny_model("llama", attn_implementation="sdpa").train() for _ in range(2))
    apply_kernels(model, KernelsConfig(attention="te"), GPU)
    ids = torch.randint(5, 260, (2, 16))
    with pytest.raises(ValueError, match=r"computes in bf16 or fp16, and the run in torch\.float32"):
        model(input_ids=ids, use_cache=False)
    with torch.autocast("cpu", torch.bfloat16):
        half = [m(input_ids=ids, use_cache=False).logits for m in (model, plain)]
    torch.testing.assert_close(*half, rtol=2e-2, atol=2e-2)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    attention._warn_of_masks.cache_clear()
    with pytest.warns(UserWarning, match="attention='te': rows with padding"):
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    close(found, plain(input_ids=ids, attention_mask=mask, use_cache=False).logits)


def test_fp8() -> None:
    loss, gradients = step(tiny_model("llama"))
    for recipe in ("delayed", "current"):
        model = tiny_model("llama")
        swap_linear_layers(model, TRANSFORMER_ENGINE, recipe)
        stand_in.state.updates = 0
        ours, found = step(model)
        assert ours == pytest.approx(loss.item(), rel=1e-2)
        assert ours != loss
        together = [torch.cat([g[name].flatten() for name in gradients]) for g in (found, gradients)]
        assert 1e-4 < relative_error(*together) < 0.12
        assert str(fp8_layers(model)) == f"14 linear layers in fp8 (TransformerEngine, {recipe})"
        # delayed scales change once, when the model's forward is over
        assert stand_in.state.updates == (1 if recipe == "delayed" else 14)


def test_odd_numbers_of_tokens_are_not_multiplied_in_fp8() -> None:
    _transformer_engine._warn_of_odd_rows.cache_clear()
    model = tiny_model("llama")
    swap_linear_layers(model, TRANSFORMER_ENGINE, "current")
    with pytest.warns(UserWarning, match="no multiple of 8 is not multiplied in fp8"):
        found = step(model, rows=1, length=13)
    check_step(found, step(tiny_model("llama"), rows=1, length=13), 13)


def test_checkpoint(tmp_path: Path) -> None:
    """Built on meta, filled from a folder and written to another one: the same weights under the same names."""
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    with torch.device("meta"):
        swapped = tiny_model("llama")
    apply_kernels(swapped, ALL, GPU)
    assert list(swapped.state_dict()) == list(model.state_dict())
    from automodel_trainer.models.build import fill_from_folder

    fill_from_folder(swapped, tmp_path / "a", None)
    swapped.set_attn_implementation("sdpa")
    check_step(step(swapped), step(plain), 128)
    swapped.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    torch.testing.assert_close(again.state_dict(), plain.state_dict())


@pytest.mark.parametrize("first", ["kernels", "adapters"])
def test_adapters(first: str) -> None:
    """The base multiplies through TransformerEngine, the factors do not; whichever comes first."""
    plain = apply_lora(tiny_model("llama"), LoRAConfig(rank=4))
    finish_lora(plain)
    model = tiny_model("llama")
    if first == "kernels":
        swap_linear_layers(model, TRANSFORMER_ENGINE, None)
    apply_lora(model, LoRAConfig(rank=4))
    finish_lora(model)
    if first == "adapters":
        assert len(swap_linear_layers(model, TRANSFORMER_ENGINE, None)[0]) == 14
    layers = [module for module in model.modules() if isinstance(module, SwappedLinear)]
    assert len(layers) == 14
    assert all(type(layer.lora_A) is nn.Linear for layer in layers)
    check_step(step(model), step(plain), 128)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_compiled_blocks() -> None:
    """The compiler goes around TransformerEngine: the same numbers, and layers of one shape share what is compiled."""
    results = []
    for compiled in (False, True):
        model = tiny_model("llama", num_hidden_layers=4).train()
        apply_kernels(model, KernelsConfig(attention="sdpa", norm="te", linear="te", fp8="delayed"), GPU)
        if compiled:
            torch._dynamo.reset()
            counters.clear()
            compile_blocks(model, "aot_eager")
        results.append(step(model))
    check_step(results[1], results[0], 128)
    assert 0 < counters["stats"]["unique_graphs"] < 12


def test_refusals() -> None:
    use("torchao")
    with pytest.raises(ValueError, match=r"fp8='rowwise' is not for linear='te'\. Allowed: delayed, current, block"):
        apply_kernels(tiny_model("llama"), KernelsConfig(linear="te", fp8="rowwise"), GPU)
    with pytest.raises(ValueError, match=r"fp8='delayed' is a recipe of TransformerEngine: set linear='te'"):
        apply_kernels(tiny_model("llama"), KernelsConfig(fp8="delayed"), GPU)
    with pytest.raises(ValueError, match=r"fp8='block' with linear='te': FP8 block scaled GEMM requires"):
        swap_linear_layers(tiny_model("llama"), TRANSFORMER_ENGINE, "block")
    small = tiny_model("llama", hidden_size=36, head_dim=10, intermediate_size=72)
    with pytest.raises(ValueError, match=r"linear='te' would change nothing: .* multiples of 16 \(model\.layers\.0\."):
        swap_linear_layers(small, TRANSFORMER_ENGINE, "current")
    model = tiny_model("llama")
    swap_linear_layers(model, TRANSFORMER_ENGINE, "delayed")
    with pytest.raises(ValueError, match="with fp8='delayed' every run changes the"):
        apply_activation_checkpointing(model, "full")
    with pytest.raises(ValueError, match=r"computes as a .*SwappedLinear, which takes no quantized weight"):
        apply_lora(model, LoRAConfig(rank=4, quantize="nf4"))
    packed = apply_lora(tiny_model("llama", hidden_size=64), LoRAConfig(rank=4, quantize="nf4"))
    with pytest.raises(
        ValueError, match=r"linear='te' would change nothing: .*its weight is held quantized \(lora quantize"
    ):
        swap_linear_layers(packed, TRANSFORMER_ENGINE, None)
    packed = apply_lora(
        tiny_model("llama", hidden_size=64), LoRAConfig(rank=4, quantize="nf4", target_modules=["down_proj"])
    )
    apply_kernels(packed, KernelsConfig(attention="eager", linear="te"), GPU)
    assert (
        kernels_in_use(packed)
        .texts["linear"]
        .startswith("TransformerEngine (12 layers); not model.layers.0.mlp.down_proj")
    )


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    for options in ({"linear": "te"}, {"norm": "te"}, {"attention": "te"}):
        with pytest.raises(ValueError, match=r"='te' needs TransformerEngine: pip install 'automodel-trainer\[te\]'"):
            apply_kernels(tiny_model("llama"), KernelsConfig(**options), GPU)


def test_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter that the stand-in names, the library has, at the same place and with the same default."""
    monkeypatch.undo()
    te = pytest.importorskip("transformer_engine.pytorch")
    for name in ("Linear", "RMSNorm", "DotProductAttention", "autocast", "is_fp8_available"):
        theirs = inspect.signature(getattr(te, name)).parameters
        for key, parameter in inspect.signature(getattr(stand_in, name)).parameters.items():
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                assert theirs[key].default == parameter.default, (name, key)


def trained_on_ranks(spec: str, world_size: int, config: KernelsConfig) -> Any:
    """Three steps of a small model under a layout, with kernels of the stand-in."""
    import tests.strategies.test_parity as parity

    patch = pytest.MonkeyPatch()
    stand_in.install(patch)

    def swapped(*args: Any, **kwargs: Any) -> Any:
        model = tiny_model(*args, **kwargs)
        apply_kernels(model, config, GPU)
        model.set_attn_implementation("sdpa")
        return model

    patch.setattr(parity, "tiny_model", swapped)
    try:
        return parity.train(spec, world_size, 4, "qwen2", False)
    finally:
        patch.undo()


@pytest.mark.parametrize("spec", ["fsdp2", "fsdp2:tp=2", "fsdp2:tp=2,activation_checkpointing=full"])
def test_layouts(pool: RankPool, spec: str) -> None:
    """Weights that come, go and are cut over ranks, with biases that are added once."""
    expected = reference("qwen2", tied=False)
    for result in pool.run(2, trained_on_ranks, spec, 2, KernelsConfig(norm="te", linear="te")):
        check_steps(result, expected)
