"""What compiled code keeps of packed weights from the forward to the backward."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from automodel_trainer.models.lora.layers import adapt_linear
from automodel_trainer.models.quantization import fp8_weight
from automodel_trainer.models.quantization.quantized_tensor import quantize
from tests.beside import use

ROWS, SIZE = 48, 256


@torch.library.custom_op("tests::scaled_matmul", mutates_args=())
def scaled_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    return (a.float() * scale_a) @ (b.float() * scale_b)


@scaled_matmul.register_fake
def _(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    return torch.empty(a.shape[0], b.shape[1])


@pytest.mark.parametrize("packing", ["fp8-tensorwise", "fp8-rowwise", "nf4", "bnb-nf4"])
def test_a_compiled_forward_keeps_weights_packed(packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights unpacked or transposed would all be there at once, on every rank."""
    use("bitsandbytes" if "bnb" in packing else "torchao")
    monkeypatch.setattr(fp8_weight, "scaled_matmul", lambda *args: scaled_matmul(*args[:4]))
    kept: list[Any] = []

    def forward_graph(graph: torch.fx.GraphModule, _: Any) -> Any:
        made = [node for node in graph.graph.output_node().args[0] if getattr(node, "op", None) == "call_function"]
        kept.extend(node.meta["val"] for node in made if isinstance(node.meta.get("val"), Tensor))
        return make_boxed_func(graph.forward)

    weights = [quantize(torch.randn(SIZE, SIZE), packing, 256) for _ in range(3)]
    backend = aot_autograd(
        fw_compiler=forward_graph,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    run = torch.compile(lambda x: functools.reduce(lambda x, w: F.linear(x, w).tanh(), weights, x), backend=backend)
    x = torch.randn(ROWS, SIZE, requires_grad=True)
    run(x).square().mean().backward()
    assert x.grad is not None
    assert kept  # activations
    assert all(value.numel() in (1, ROWS, ROWS * SIZE) for value in kept)


def test_dora_with_dropout_keeps_weights_packed() -> None:
    use("torchao")
    layer: Any = nn.Linear(SIZE, SIZE, bias=False)
    layer.weight = nn.Parameter(quantize(torch.randn(SIZE, SIZE), "nf4", 256), requires_grad=False)
    adapt_linear(layer, 4, 1.0, dropout=0.5, dora=True, dtype=torch.float32)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor:
            kept.append(tensor.numel())
        return tensor

    x = torch.randn(ROWS, SIZE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer.train()(x)
    assert kept
    assert max(kept) == ROWS * SIZE
    out.sum().backward()
    assert x.grad is not None
