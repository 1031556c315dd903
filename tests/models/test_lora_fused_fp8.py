"""Frozen fp8 weights and their adapters in one matmul, emulated on a CPU, against plain arithmetic."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from automodel_trainer.models.kernels import choose as kernels
from automodel_trainer.models.kernels.choose import KernelsConfig
from automodel_trainer.models.kernels.fp8 import convert_to_fp8
from automodel_trainer.models.lora import LoRAConfig, adapters, apply_lora, finish_lora, fused_fp8
from automodel_trainer.models.lora.fuse import Fusion
from automodel_trainer.models.lora.fused import refresh
from automodel_trainer.models.lora.fused_fp8 import FusedFp8
from automodel_trainer.models.lora.layers import LoRALinear, adapt_linear
from automodel_trainer.models.quantization.quantized_tensor import quantize
from automodel_trainer.models.record import record_of
from automodel_trainer.nn.shared_input import layers_with_one_input
from automodel_trainer.strategies.base.compile import compile_blocks
from tests.harness import close, relative_error
from tests.matrix import more
from tests.models.test_fp8 import CPU, TOLERANCE, step
from tests.models.test_lora_layouts import train as train_lora
from tests.models.test_lora_peft import disturb
from tests.pool import RankPool
from tests.tiny import tiny_model

TOKENS, INPUTS, SIZES = 40, 64, [(48, 5), (32, 3)]  # outputs and rank of two layers


def layers(weight_scale: float, b_scale: float = 1.0) -> list[LoRALinear]:
    """The second layer's weights ten times as large as the first's."""
    made = []
    for index, (out, rank) in enumerate(SIZES):
        layer: Any = nn.Linear(INPUTS, out, bias=False)
        packed = quantize(torch.randn(out, INPUTS) * weight_scale * 10**index, "fp8-tensorwise", 0)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        adapt_linear(layer, rank, 0.5 + index, dropout=0.0, dora=False, dtype=torch.float32)
        nn.init.normal_(layer.lora_A.weight)
        nn.init.normal_(layer.lora_B.weight, std=b_scale)
        made.append(layer)
    return made


def plain(members: list[LoRALinear], x: Tensor) -> Tensor:
    """What it stands for, with the numbers that the codes stand for, in fp64."""
    parts = []
    for layer in members:
        weight: Any = layer.weight
        update = layer.scaling * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
        parts.append(x.double() @ (weight.get_original_weight().double() + update).T)
    return torch.cat(parts, 1)


def computed(members: list[LoRALinear], x: Tensor) -> Tensor:
    """The same in fp8."""
    group = FusedFp8(members)
    refresh([group])
    return torch.cat(list(group.outputs_of(x)), 1)


@pytest.mark.parametrize("weight_scale", [1e-4, 1e-2, 1.0], ids=["update is all", "both matter", "weight is all"])
def test_outputs_and_gradients(weight_scale: float) -> None:
    torch.manual_seed(0)
    members = layers(weight_scale)
    factors = [factor.weight for layer in members for factor in (layer.lora_A, layer.lora_B)]
    x, gradient = torch.randn(TOKENS, INPUTS, requires_grad=True), torch.randn(TOKENS, sum(out for out, _ in SIZES))
    expected = plain(members, x)
    wanted = torch.autograd.grad(expected, [x, *factors], gradient.double())

    out = computed(members, x)
    found = torch.autograd.grad(out, [x, *factors], gradient)

    for rows in (slice(0, 48), slice(48, 80)):
        assert relative_error(out[:, rows], expected[:, rows]) < TOLERANCE["tensorwise"] / 2
    assert relative_error(found[0], wanted[0]) < TOLERANCE["tensorwise"] / 2
    # nothing that the factors' gradients are made of was cast
    for one, other in zip(found[1:], wanted[1:]):
        close(one, other, TOKENS * INPUTS)  # of products with factors, over tokens


def test_tokens_of_very_different_size_are_each_as_exact() -> None:
    """Every token has a scale of its own; and a token that is zero has one that divides."""
    torch.manual_seed(0)
    members = layers(1e-2)
    sizes = torch.logspace(-8, 4, TOKENS)[:, None]
    sizes[7] = 0
    x, gradient = torch.randn(TOKENS, INPUTS) * sizes, torch.randn(TOKENS, sum(out for out, _ in SIZES)) * sizes.flip(0)
    x.requires_grad_()
    expected = plain(members, x)
    (wanted,) = torch.autograd.grad(expected, x, gradient.double())

    out = computed(members, x)
    (found,) = torch.autograd.grad(out, x, gradient)

    for index in range(TOKENS):
        assert out[index].isfinite().all()
        assert relative_error(out[index, :48], expected[index, :48]) < TOLERANCE["tensorwise"]
        assert relative_error(found[index], wanted[index]) < TOLERANCE["tensorwise"]


def test_rows_are_scaled_in_the_matmul_or_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, gradient = [], torch.randn(TOKENS, sum(out for out, _ in SIZES))
    for limit in (0, 2**26):
        monkeypatch.setattr(fused_fp8, "_SCALED_BY_CUBLAS", limit)
        torch.manual_seed(0)
        members = layers(1.0)
        x = torch.randn(TOKENS, INPUTS, requires_grad=True)
        out = computed(members, x)
        outputs.append((out.detach(), *torch.autograd.grad(out, x, gradient)))
    for one, other in zip(*outputs):
        close(one, other, TOKENS * INPUTS)


def test_no_product_outgrows_its_row_s_scale() -> None:
    """The worst case: a row of x that is a row of A, of few large numbers; and a B as large as the weights are."""
    torch.manual_seed(0)
    members = layers(1e-4, b_scale=3.0)
    with torch.no_grad():
        for layer in members:
            layer.lora_A.weight[:, 8:] *= 1e-3
    x = torch.cat([layer.lora_A.weight.detach() for layer in members]) * 50
    expected = plain(members, x)
    out = computed(members, x)
    for index in range(len(x)):
        assert relative_error(out[index], expected[index]) < TOLERANCE["tensorwise"]


def test_b_begins_as_zero() -> None:
    members = layers(1.0, b_scale=0.0)
    x = torch.randn(TOKENS, INPUTS)
    group = FusedFp8(members)
    refresh([group])
    (out, _) = group.outputs_of(x)
    out.sum().backward()
    (reference,) = torch.autograd.grad(plain(members, x)[:, :48].sum(), [members[0].lora_B.weight])
    close(members[0].lora_B.weight.grad, reference, TOKENS * INPUTS)


def adapted(fp8: bool = True, dropout: float = 0.0, kernel: str = "fused") -> Any:
    model = tiny_model("llama", num_hidden_layers=1, use_cache=False)
    apply_lora(model, LoRAConfig(rank=4, dropout=dropout))
    if fp8:
        convert_to_fp8(model, "tensorwise", CPU, emulate=True)
        names = [adapter.target for adapter in adapters(model)]
        record_of(model).keep(Fusion(kernel, layers_with_one_input(model, names)))
    finish_lora(model)
    disturb(model)
    for adapter in adapters(model):  # an update as large as the weight would be as far off as the weight is
        adapter.b.weight.data *= 0.2
    if fp8:
        compile_blocks(model, "aot_eager", None if kernel == "fused" else [model.model.layers[0].mlp])
    return model.train()


def test_a_model_trains_as_its_full_precision_twin_does() -> None:
    exact, model = adapted(fp8=False), adapted()
    groups = {id(adapter.module.fused) for adapter in adapters(model)}
    assert len(groups) == 4  # of a block: q, k, v; o; gate, up; down
    for _ in range(2):  # the factors of the second step are others
        expected, wanted = step(exact)
        loss, gradients = step(model)
        assert loss == pytest.approx(expected.item(), rel=2e-3)
        assert gradients.keys() == wanted.keys()
        together = [torch.cat([g[name].flatten() for name in wanted]) for g in (gradients, wanted)]
        assert 1e-3 < relative_error(*together) < TOLERANCE["tensorwise"]
        for m in (exact, model):
            with torch.no_grad():
                for parameter in m.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None


def test_dropout_needs_base_and_update_apart() -> None:
    with pytest.raises(ValueError, match="in fp8, dropout needs base and update apart"):
        adapted(dropout=0.1)
    torch.manual_seed(0)
    model = adapted(dropout=0.9, kernel="separate")
    loss, _ = step(model)
    assert abs(loss - step(model.eval())[0]) > 1e-3


def train_counted(spec: str, world_size: int, base: Path) -> tuple[dict[str, Any], list[int]]:
    """And of how many groups the factors were taken in, each time."""
    counts: list[int] = []
    border = fused_fp8._border

    def counted(scale: Tensor, *args: Any) -> Any:
        counts.append(len(scale))
        return border(scale, *args)

    embed = nn.Embedding.forward
    with pytest.MonkeyPatch.context() as patch:
        # inputs of the first block need gradients as those of the second do: the compiler takes one block for both
        patch.setattr(nn.Embedding, "forward", lambda layer, ids: embed(layer, ids).requires_grad_())
        patch.setattr(fused_fp8, "_border", counted)
        patch.setattr(kernels, "convert_to_fp8", partial(convert_to_fp8, emulate=True))
        chosen = KernelsConfig(fp8="tensorwise", lora="fused", attention="eager")
        return train_lora(spec, world_size, "bf16", base, {}, chosen), counts


@pytest.mark.parametrize(("layout", "world_size"), [more("", 1), ("dp_shard=1,dp_replicate=2,", 2)])
def test_factors_of_all_blocks_are_taken_in_at_once(
    pool: RankPool, tmp_path: Path, layout: str, world_size: int
) -> None:
    """Once per optimizer step, though FSDP2 shows blocks their factors in bf16 one after the other."""
    tiny_model("llama").save_pretrained(tmp_path)
    (exact,) = pool.run(1, train_lora, "ddp", 1, "fp32", tmp_path, {})
    spec = f"fsdp2:{layout}compile=true,compile_backend=aot_eager"
    result, counts = pool.run(world_size, train_counted, spec, world_size, tmp_path)[0]
    assert counts == 3 * 4 * [2]  # steps; kinds of groups in a block (q, k, v; o; gate, up; down); blocks
    assert result["losses"] == pytest.approx(exact["losses"], rel=1e-2)
    together = [torch.cat([t.flatten() for t in run["trained"].values()]) for run in (result, exact)]
    assert relative_error(*together) < TOLERANCE["tensorwise"]
