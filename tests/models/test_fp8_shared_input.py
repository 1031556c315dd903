"""Trained fp8 layers that share an input, emulated on a CPU, against dense arithmetic and torchao's own layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from automodel_trainer.models.kernels.fp8 import convert_to_fp8
from automodel_trainer.models.quantization.fp8_shared_input import Fp8Linear, _codes, _Matmul
from automodel_trainer.models.quantization.fp8_weight import E4M3, E5M2
from automodel_trainer.strategies.base.compile import compile_blocks
from tests.beside import use
from tests.harness import check_step, close, relative_error
from tests.matrix import more
from tests.models.test_fp8 import CPU, TOLERANCE, step
from tests.pool import forget_compiled
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def _torchao() -> None:
    use("torchao")
    forget_compiled()  # the tests have batches of different sizes


def converted(family: str, compiled: bool, layers: int = 2) -> Any:
    model = tiny_model(family, use_cache=False, num_hidden_layers=layers).train()
    convert_to_fp8(model, "tensorwise", CPU, emulate=True)
    if compiled:
        compile_blocks(model, "aot_eager")
    return model


def test_groups_are_of_one_block_and_one_input() -> None:
    model = converted("llama", compiled=False)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Fp8Linear)}
    assert len(layers) == 14
    groups = {id(layer.together): layer.together for layer in layers.values()}.values()
    names = {id(layer): name.rpartition(".")[2] for name, layer in layers.items()}
    found = [[names[id(layer)] for layer in group.layers] for group in groups]
    assert found == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", (3, 5)),  # 15 tokens: what is summed has to be filled up
        ("qwen2", (4, 32)),  # has biases
        more("llama", (4, 32)),
        more("qwen2", (3, 5)),
    ],
)
def test_as_close_to_full_precision_as_torchao(family: str, shape: tuple[int, int]) -> None:
    loss, wanted = step(tiny_model(family, use_cache=False, num_hidden_layers=1).train(), shape)
    (_, apart), (ours, together) = (step(converted(family, compiled, layers=1), shape) for compiled in (False, True))
    assert ours == pytest.approx(loss.item(), rel=1e-3)
    assert together.keys() == wanted.keys()
    exact, theirs, found = (torch.cat([g[name].flatten() for name in wanted]) for g in (wanted, apart, together))
    assert 1e-4 < relative_error(found, exact) < min(TOLERANCE["tensorwise"], 1.2 * relative_error(theirs, exact))
    assert not torch.equal(found, theirs)  # or nothing was computed together
    sizable = [name for name in wanted if "k_proj.bias" not in name]  # which changes nothing: its gradient is noise
    worst = max(relative_error(together[name], wanted[name]) for name in sizable)
    assert worst < 1.5 * TOLERANCE["tensorwise"]


def test_evaluation_and_eager_training_are_torchaos() -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=True)
    theirs = convert_to_float8_training(
        tiny_model("llama", use_cache=False), config=config, module_filter_fn=lambda _, name: "layers" in name
    )
    ours = converted("llama", compiled=True).eval()
    ids = torch.arange(5, 37)[None]
    assert torch.equal(ours(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)
    assert type(ours.model.layers[0].mlp.up_proj).__mro__[2] is type(theirs.model.layers[0].mlp.up_proj)


def test_a_frozen_layer_of_a_group_has_no_gradient() -> None:
    model, whole = (converted("llama", compiled=True, layers=1) for _ in range(2))
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    (loss, some), (wanted, every) = step(model), step(whole)
    assert loss == wanted
    assert set(every) - set(some) == {"model.layers.0.self_attn.k_proj.weight"}
    check_step((loss, some), (wanted, {name: every[name] for name in some}), 128)


def rounded(x: Tensor, dtype: torch.dtype, largest: Tensor) -> Tensor:
    """The numbers that are left of x, in fp64, when `largest` is the largest number of `dtype`."""
    scale = torch.finfo(dtype).max / largest.double()
    return (x.double() * scale).float().to(dtype).double() / scale


def test_the_products_of_codes_are_what_dense_arithmetic_says() -> None:
    """Against fp64 products of the rounded numbers, the weights with one scale and the gradients with one."""
    generator = torch.Generator().manual_seed(1)
    sizes, scales = [48, 16, 32], [1.0, 30.0, 0.2]

    def several(width: int) -> list[Tensor]:
        return [torch.randn(s, width, generator=generator) * scale for s, scale in zip(sizes, scales)]

    weights = [weight.requires_grad_() for weight in several(64)]
    x = torch.randn(32, 64, generator=generator, requires_grad=True)
    gradients = [gradient.T for gradient in several(32)]
    outputs = _Matmul.apply(x, *_codes(weights), *weights)
    torch.autograd.backward(outputs, gradients)

    def one_scale(parts: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        largest = torch.stack([part.detach().abs().max() for part in parts]).max()
        return [rounded(part.detach(), dtype, largest) for part in parts]

    (cast,), codes, of_outputs = one_scale([x], E4M3), one_scale(weights, E4M3), one_scale(gradients, E5M2)
    for output, code in zip(outputs, codes):
        close(output, cast @ code.T)
    assert x.grad is not None
    close(x.grad, sum(g @ w for g, w in zip(of_outputs, codes)), sum(sizes))
    for weight, gradient in zip(weights, of_outputs):
        assert weight.grad is not None
        close(weight.grad, gradient.T @ cast)
