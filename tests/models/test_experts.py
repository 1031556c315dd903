"""Experts in grouped matmuls against transformers' eager code, which computes them one by one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer.models._experts import hold_part_of_experts
from automodel_trainer.models.kernels import KernelsConfig, apply_kernels, kernels_in_use
from automodel_trainer.models.kernels.experts import GroupedExperts, experts_to_fp8, swap_experts
from automodel_trainer.models.lora import LoRAConfig, apply_lora, finish_lora
from automodel_trainer.models.lora.layers import LoRAParameters
from tests.beside import use
from tests.limits import check_step, close
from tests.routers import decided, routed_model
from tests.strategies.test_expert import FAMILIES
from tests.tiny import tiny_model


def eager(family: str, lora: bool = False, sizes: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
    """The same weights in whatever order tests run; tokens choose their experts clearly."""
    model = routed_model(family, **{**FAMILIES[family], **(sizes or {})}, experts_implementation="eager")
    if lora:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            apply_lora(model, LoRAConfig(rank=4, target_modules=["gate_up_proj", "down_proj"], **options))
            finish_lora(model)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.05)
    return model


def loss_and_gradients(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(6, 260, (2, 17), generator=torch.Generator().manual_seed(1))
    with decided(model):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    check_step(loss_and_gradients(model), loss_and_gradients(other), 34)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, lora: bool) -> None:
    model = eager(family, lora)
    grouped = copy.deepcopy(model)
    swapped, left = swap_experts(grouped)
    assert swapped
    assert not left
    assert grouped.state_dict().keys() == model.state_dict().keys()
    check_same(grouped, model)


def test_in_a_compiled_model() -> None:
    model = eager("gpt_oss", lora=True, sizes={"num_hidden_layers": 1, "layer_types": ["full_attention"]})
    grouped = copy.deepcopy(model)
    swap_experts(grouped)
    grouped.compile(backend="aot_eager")
    check_same(grouped, model)


def test_weights_in_four_bits() -> None:
    use("torchao")
    # 4 bits come in blocks of 16,384 numbers
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 256}
    model = eager("qwen3_moe", lora=True, sizes=sizes, quantize="nf4")
    grouped = copy.deepcopy(model)
    assert swap_experts(grouped)[0]
    check_same(grouped, model)


def test_a_compiled_backward_takes_weights_out_of_four_bits_again() -> None:
    """The compiler may not keep the dense weights of the forward: they are as large as a model in 16 bits."""
    use("torchao")
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 256}
    model = eager("qwen3_moe", lora=True, sizes=sizes, quantize="nf4")
    swap_experts(model)
    dense = {p.numel() for p in model.parameters() if p.ndim == 3}
    model.compile(backend="aot_eager_decomp_partition")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    loss.backward()
    assert kept
    assert not [t.shape for t in kept if t.is_floating_point() and t.numel() in dense]


def test_updated_weights_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = eager("qwen3_moe", lora=True)
    swap_experts(model)
    built: list[str] = []
    monkeypatch.setattr(LoRAParameters, "forward", lambda *_, **__: built.append("weight"))
    loss_and_gradients(model)
    assert built == []


@pytest.mark.parametrize("counted", [False, True], ids=["", "counted"])
def test_choices_of_experts_held_elsewhere_count_as_zeros(counted: bool) -> None:
    """Two halves of the experts, each of which skips the other's, add up to the whole."""
    whole = next(m for m in eager("gpt_oss").modules() if hasattr(m, "gate_up_proj"))
    x, weights = torch.randn(9, 32), torch.rand(9, 2)
    chosen = torch.randint(0, 4, (9, 2))
    total = torch.zeros(9, 32)
    for first in (0, 2):
        half = copy.deepcopy(whole)
        for name, parameter in list(half.named_parameters()):
            setattr(half, name, nn.Parameter(parameter[first : first + 2].detach().clone()))
        hold_part_of_experts(half, 2)
        swap_experts(nn.ModuleList([half]))
        here = (chosen >= first) & (chosen < first + 2)
        known = {"choices": int(here.sum())} if counted else {}
        total += half(x, torch.where(here, chosen - first, 2), weights * here, **known)
    close(total, whole(x, chosen, weights))


def test_choice_and_ledger() -> None:
    cpu = torch.device("cpu")
    model = eager("qwen3_moe")
    apply_kernels(model, KernelsConfig(), cpu)
    assert not any(isinstance(module, GroupedExperts) for module in model.modules())
    apply_kernels(model, KernelsConfig(experts="grouped"), cpu)
    assert kernels_in_use(model).texts["experts"] == "grouped (1 modules of experts)"
    with pytest.raises(ValueError, match="LlamaForCausalLM has no modules of experts"):
        apply_kernels(tiny_model(), KernelsConfig(experts="grouped"), cpu)
    with pytest.raises(ValueError, match="experts='fast' is unknown"):
        KernelsConfig(experts="fast")


# --- fp8 --------------------------------------------------------------------------------------------------------------


def cast(x: Tensor, dim: int) -> Tensor:
    """x as fp8 with a scale for each row along `dim` holds it."""
    scale = x.abs().amax(dim, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def by_hand(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor, frozen: bool) -> Tensor:
    """The experts one by one, with every product in fp8 as `kernels/experts_fp8.py` says."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return cast(x, 1) @ cast(weight, 1).mT

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, weight = ctx.saved_tensors
            if not frozen:
                return cast(grad, 1) @ cast(weight, 0), grad.mT @ x
            scale = weight.abs().amax(1) / 448
            codes = (weight / scale[:, None]).to(torch.float8_e4m3fn).float()
            return cast(grad * scale, 1) @ codes, None

    total = torch.zeros_like(x)
    for expert in range(4):
        token, slot = (index == expert).nonzero(as_tuple=True)
        if len(token):
            up, down = (getattr(module, name)[expert] for name in ("gate_up_proj", "down_proj"))
            gate, value = Product.apply(x[token], up).chunk(2, -1)
            inner = nn.functional.silu(gate) * value * weights[token, slot, None]
            total = total.index_add(0, token, Product.apply(inner, down))
    return total


@pytest.mark.parametrize("frozen", [False, True], ids=["cast", "held"])
def test_products_in_fp8(frozen: bool) -> None:
    """Outputs and gradients against casts and sums written out, and near those without fp8."""
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16}
    model = tiny_model("qwen3_moe", **{**FAMILIES["qwen3_moe"], **sizes})
    if frozen:
        apply_lora(model, LoRAConfig(rank=4, target_modules=["gate_up_proj"]))  # its update is zero
        finish_lora(model)
    plain = copy.deepcopy(model)
    assert not experts_to_fp8(model, swap_experts(model)[0])
    finish_lora(model)
    name = next(n for n, m in model.named_modules() if n.endswith("experts"))
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 40, 32, generator=generator).unbind()
    index = torch.rand(40, 4, generator=generator)[:, :3].argsort(1)[:, :2]  # the last expert gets no token
    weights = torch.rand(40, 2, generator=generator)

    def run(function: Any, module: nn.Module) -> list[Tensor]:
        given = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = function(given[0], index, given[1])
        out.backward(grad)
        own = [] if frozen else [module.gate_up_proj.grad, module.down_proj.grad]
        return [out, given[0].grad, given[1].grad, *own]  # type: ignore[list-item]

    experts, exact = model.get_submodule(name), plain.get_submodule(name)
    got = run(experts, experts)
    near = run(exact, exact)
    exact.zero_grad()
    expected = run(lambda *args: by_hand(exact, *args, frozen), exact)
    for ours, theirs, without in zip(got, expected, near, strict=True):
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()  # a cast may round otherwise
        assert (ours - without).norm() < 0.1 * without.norm()


def test_experts_that_stay_as_they_are() -> None:
    model = eager("qwen3_moe", sizes={"moe_intermediate_size": 24})
    left = experts_to_fp8(model, swap_experts(model)[0])
    assert all("24" in why for why in left.values())
    assert left
