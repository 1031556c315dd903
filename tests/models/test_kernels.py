"""The `kernels:` section: what is recognised, what "auto" is, what is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from automodel_trainer.models.kernels import KernelsConfig, apply_kernels, check_compiled, config, kernels_in_use, rope
from automodel_trainer.models.kernels import norm as norms
from automodel_trainer.models.kernels.libraries._liger import LIGER
from automodel_trainer.models.kernels.library import LossKernel
from automodel_trainer.models.kernels.mlp import GatedMLP, swap_gated_mlps
from automodel_trainer.models.kernels.mlp import recognise as recognise_mlp
from automodel_trainer.models.kernels.norm import Norm, swap_norms
from automodel_trainer.models.kernels.rope import restore_rope, rope_obstacle, rotate_half, swap_rope
from automodel_trainer.modules.loss import summed_loss
from automodel_trainer.nn.deferred_logits import DeferredLogits
from tests.harness import close
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "norm"),
    [
        ("llama", Norm(False, 1e-6)),
        ("olmo2", Norm(False, 1e-5, wide=True)),
        ("gemma3_text", Norm(False, 1e-6, 1.0, wide=True)),
        ("gpt_neox", Norm(True, 1e-5, wide=True)),
        ("nemotron", Norm(True, 1e-5, 1.0, wide=True)),
    ],
)
def test_norms_are_known_by_what_they_compute(family: str, norm: Norm) -> None:
    """On meta too; and the reference that kernels are held against computes what the model does."""
    model, seen = tiny_model(family), []
    with torch.device("meta"):
        on_meta = tiny_model(family)
    for m in (model, on_meta):
        swapped, left = swap_norms(m, lambda found: seen.append(found) or found.reference)
        assert not left
        assert len(swapped) == sum("norm" in name.rpartition(".")[2] for name, _ in tiny_model(family).named_modules())
    assert set(seen) == {norm}
    ids = torch.randint(5, 260, (2, 9))
    plain = tiny_model(family)
    close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert list(model.state_dict()) == list(plain.state_dict())


class Almost(nn.Module):
    """A norm with a gate, or with another power: nothing that a kernel computes."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.weight, self.eps, self.power = nn.Parameter(torch.ones(32)), 1e-6, power

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).pow(self.power)


def test_what_looks_like_a_norm_is_looked_at() -> None:
    assert norms.recognise(Almost(-0.5)) == Norm(False, 1e-6, wide=True)
    assert norms.recognise(Almost(-0.45)) is None
    assert norms.recognise(nn.PReLU(32)) is None
    other_eps = Almost(-0.5)
    other_eps.eps = 1e-3
    assert norms.recognise(other_eps) == Norm(False, 1e-3, wide=True)


def test_gated_mlps() -> None:
    model = tiny_model("gemma3_text")
    found: list[GatedMLP] = []
    swapped, left = swap_gated_mlps(model, lambda mlp: found.append(mlp) or (lambda a, b: 0 * a * b))
    assert set(found) == {GatedMLP("gelu_tanh", "gate_proj", "up_proj", "down_proj")}
    assert (swapped, left) == (["model.layers.0.mlp", "model.layers.1.mlp"], {})
    assert not model.model.layers[0].mlp(torch.randn(1, 3, 32)).any()
    model.train()
    assert all(module.training for module in model.modules())
    mlp = tiny_model("llama").model.layers[0].mlp
    mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.1))
    assert recognise_mlp(mlp.eval()) is None, "the dropout would be gone"
    assert recognise_mlp(tiny_model("gpt_neox").gpt_neox.layers[0].mlp) is None


def test_recognised_inside_of_a_device_context() -> None:
    """Strategies, and notebooks with a default device, build models there."""
    model = tiny_model("llama")
    layer = model.model.layers[0]
    with torch.device("meta"):
        assert recognise_mlp(layer.mlp) is not None
        assert norms.recognise(layer.input_layernorm) is not None
        assert rope_obstacle(model) is None


def test_rope_is_exchanged_and_put_back() -> None:
    model, calls = tiny_model("llama"), []
    home = sys.modules[type(model).__module__]
    original = home.apply_rotary_pos_emb
    ids = torch.randint(5, 260, (2, 9))
    wanted = model(input_ids=ids).logits

    def kernel(*args: Any) -> Any:
        calls.append(args)
        return rotate_half(*args)

    assert swap_rope(model, kernel, CPU) == [f"{home.__name__}.apply_rotary_pos_emb"]
    swap_rope(model, kernel, CPU)  # not around itself
    close(model(input_ids=ids).logits, wanted)
    assert len(calls) == 2
    restore_rope(model)
    assert home.apply_rotary_pos_emb is original
    with pytest.raises(ValueError, match="another way than by halves of a head"):
        swap_rope(tiny_model("glm4"), kernel, CPU)
    assert not hasattr(sys.modules[type(tiny_model("glm4")).__module__].apply_rotary_pos_emb, "original")
    assert original.__name__ == rope.NAME


def test_auto_that_does_not_fit_leaves_the_model_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was asked for is an error. gpt_neox has no gated MLP."""
    liger = type("Liger", (), {f"Liger{name}Function": nn.Identity for name in ("SiLUMul", "GELUMul")})
    monkeypatch.setattr(LIGER, "load", lambda: liger)
    monkeypatch.setitem(config.FASTEST, "activation", "liger")
    gpu = torch.device("cuda")
    model = tiny_model("gpt_neox")
    apply_kernels(model, KernelsConfig(attention="eager"), gpu)
    assert kernels_in_use(model).texts["activation"] == "the model's own"
    with pytest.raises(
        ValueError, match="activation='liger' would change nothing: GPTNeoXForCausalLM has no gated MLPs"
    ):
        apply_kernels(model, KernelsConfig(attention="eager", activation="liger"), gpu)


def test_compile_wants_compiled_blocks() -> None:
    check_compiled(KernelsConfig(), False)
    check_compiled(KernelsConfig(norm="compile"), True)
    asked = {"norm='compile'": KernelsConfig(norm="compile"), "lora='fused'": KernelsConfig(lora="widened")}
    for named, kernels in asked.items():
        with pytest.raises(ValueError, match=f"kernels {named}.* needs compiled blocks, and this run does not"):
            check_compiled(kernels, False)


def test_liger_loss_wants_a_plain_head() -> None:
    head = nn.Linear(8, 20)
    hidden, targets = torch.randn(1, 5, 8), torch.randint(0, 20, (1, 5))
    capped = DeferredLogits(hidden, head.forward, head).then(torch.tanh)
    for logits in (capped, torch.randn(1, 5, 20)):
        with pytest.raises(ValueError, match="loss='liger' needs a head that is a plain linear layer"):
            summed_loss(logits, targets, LossKernel("liger", LIGER.loss()))
