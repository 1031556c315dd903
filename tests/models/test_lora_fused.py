"""A frozen weight and its adapter in one matmul, against PEFT, which does them apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer import AutoModelForCausalLM
from automodel_trainer.models.kernels import KernelsConfig
from automodel_trainer.models.lora import LoRAConfig, describe_lora
from automodel_trainer.models.lora.adapter_files import save_adapter
from automodel_trainer.models.lora.fuse import fuse_adapters
from automodel_trainer.models.lora.fused import FusedDense, refresh
from automodel_trainer.models.lora.layers import LoRALinear
from automodel_trainer.modules import CausalLMModule
from automodel_trainer.nn import shared_input
from automodel_trainer.nn._torch import FakeTensorMode
from automodel_trainer.nn.shared_input import layers_with_one_input
from automodel_trainer.nn.step_cache import unchanged_weights
from automodel_trainer.strategies.base.compile import compile_blocks
from automodel_trainer.trainer import Trainer
from tests.harness import close, relative_error
from tests.limits import CHAIN, WIDTH, check_losses, check_step
from tests.matrix import more
from tests.models.test_lora_peft import IDS, base, disturb, peft_model
from tests.tiny import tiny_model


def build(folder: Path, family: str = "llama", choice: str = "fused", layers: int = 1, **lora: Any) -> PreTrainedModel:
    """Of one block, unless a test is about several, and without a cache: so most tests share one compiled block."""
    kernels, config = KernelsConfig(lora=choice), LoRAConfig(**{"rank": 5, **lora})
    folder = base(folder, family, num_hidden_layers=layers, use_cache=False)
    model = AutoModelForCausalLM.from_pretrained(folder, lora=config, kernels=kernels)
    disturb(model)
    return model.train()


def compiled(folder: Path, **options: Any) -> PreTrainedModel:
    """With `build`'s model: fused layers compute together in compiled blocks alone."""
    model = build(folder, **options)
    compile_blocks(model, "aot_eager")
    return model


FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]


def compiled_in_part(folder: Path, **options: Any) -> PreTrainedModel:
    """With adapters in the feed-forward parts, which are what is compiled: a group of two layers and one of one."""
    model = build(folder, target_modules=FEED_FORWARD, **options)
    compile_blocks(model, "aot_eager", [layer.mlp for layer in model.model.layers])
    return model


def plain(folder: Path, **options: Any) -> PreTrainedModel:
    """With the same adapters, each computed apart."""
    return build(folder, choice="separate", target_modules=FEED_FORWARD, **options)


def three_steps(model: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps, and the trained weights after them under names that PEFT has too."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return losses, {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in trained.items()}


def one_step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", [more("llama"), "qwen2", "phi3"])
def test_three_steps_are_peft_s(tmp_path: Path, family: str) -> None:
    model = build(tmp_path / "base", family, layers=2 if family == "llama" else 1)
    save_adapter(model, tmp_path / "adapter")
    reference = peft_model(tmp_path / "base", tmp_path / "adapter").train()
    compile_blocks(model, "aot_eager")
    fused = [m for m in model.modules() if isinstance(m, LoRALinear) and m.fused is not None]
    groups = len({id(m.fused) for m in fused})
    assert fused
    assert (groups < len(fused)) == (family != "phi3")  # whose projections are fused
    assert f"{len(fused)} with their weights in {groups} matmuls" in str(describe_lora(model))

    losses, trained = three_steps(model)
    their_losses, theirs = three_steps(reference)

    check_losses(losses, their_losses, IDS.numel())
    assert trained.keys() == theirs.keys()
    for name in trained:  # three gradients of so many tokens
        close(trained[name], theirs[name], 3 * CHAIN * IDS.numel(), name)


def test_weights_keep_their_names_and_values(tmp_path: Path) -> None:
    model, apart = compiled(tmp_path / "a"), build(tmp_path / "b", choice="separate")
    assert model.state_dict().keys() == apart.state_dict().keys()
    assert all(torch.equal(value, apart.state_dict()[name]) for name, value in model.state_dict().items())
    three_steps(model)
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, apart.get_parameter(n)) for n, p in frozen.items())


def test_moved_and_loaded_weights_are_the_ones_used(tmp_path: Path) -> None:
    model = compiled_in_part(tmp_path / "base")
    model(IDS)
    with torch.no_grad():  # what a load_state_dict does
        for name, parameter in model.named_parameters():
            parameter.mul_(1.5 if "norm" not in name else 1.0)
    doubled = model.to(torch.float64)
    apart = plain(tmp_path / "base").to(torch.float64)
    apart.load_state_dict(doubled.state_dict())
    close(doubled(IDS).logits, apart(IDS).logits, CHAIN * WIDTH)


def test_a_copy_computes_with_its_own_weights(tmp_path: Path) -> None:
    model, apart = build(tmp_path / "a", target_modules=FEED_FORWARD), plain(tmp_path / "b")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    compile_blocks(copied, "aot_eager", [layer.mlp for layer in copied.model.layers])
    close(copied(IDS).logits, apart(IDS).logits, CHAIN * WIDTH)


def test_two_forwards_before_their_backwards(tmp_path: Path) -> None:
    """As in preference losses: the second forward must not spoil what the first one's backward needs."""
    model, apart = compiled_in_part(tmp_path / "a"), plain(tmp_path / "b")
    for m in (model, apart):
        (m(IDS).logits.square().mean() - 0.5 * m(IDS.flip(1)).logits.square().mean()).backward()
    for (name, a), b in zip(model.named_parameters(), apart.parameters(), strict=True):
        if a.grad is not None:
            close(a.grad, b.grad, 4 * CHAIN * IDS.numel(), name)  # two sums in each of two runs


def test_compiled_as_a_whole_by_the_user_it_follows_the_optimizer(tmp_path: Path) -> None:
    model = build(tmp_path / "a", target_modules=FEED_FORWARD)
    whole = torch.compile(model, backend="aot_eager")
    whole(IDS)
    disturb(model)
    apart = plain(tmp_path / "b")
    apart.load_state_dict(model.state_dict())
    close(whole(IDS).logits, apart(IDS).logits, CHAIN * WIDTH)


GROUPS = [3, 1, 2, 1]  # layers of a llama's block that share an input: q, k, v; o; gate, up; down


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each group has that takes its factors in."""
    sizes: list[int] = []
    refresh_factors = FusedDense.refresh_factors
    monkeypatch.setattr(
        FusedDense, "refresh_factors", lambda group: (sizes.append(len(group.layers)), refresh_factors(group))
    )
    return sizes


def test_factors_are_taken_in_once_per_optimizer_step(tmp_path: Path, taken: list[int]) -> None:
    """And in every forward of whoever does not say what a step is."""
    model = compiled_in_part(tmp_path / "base", layers=2)
    expected = len(model.model.layers) * GROUPS[2:]

    def forwards(count: int) -> list[float]:
        return [float(model(input_ids=IDS, labels=IDS).loss.detach()) for _ in range(count)]

    before = forwards(2)
    assert taken == 2 * expected
    for _ in range(2):
        taken.clear()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.lora_B.weight.add_(1)
        with unchanged_weights():
            losses = forwards(3)
        assert taken == expected
        assert len(set(losses)) == 1
        assert losses[0] != before[0]
        before = losses


def test_the_trainer_says_what_a_step_is(tmp_path: Path, taken: list[int]) -> None:
    module = CausalLMModule(
        base(tmp_path, num_hidden_layers=1), lora=LoRAConfig(rank=5), kernels=KernelsConfig(lora="fused")
    )
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy="fsdp2:compile=true,compile_backend=aot_eager", max_steps=2,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    micro_batch = {"input_ids": IDS, "labels": IDS}
    trainer.fit(module, [[micro_batch, micro_batch, micro_batch]] * 2)
    assert taken == 2 * len(module.model.model.layers) * GROUPS


def test_dropout_is_on_the_update_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)  # one of so many numbers might be kept, and would count a million times
    model = compiled_in_part(tmp_path / "base", dropout=0.999999)
    unadapted = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    close(model(IDS).logits, unadapted(IDS).logits, CHAIN * WIDTH)
    assert relative_error(model.eval()(IDS).logits, unadapted(IDS).logits) > 1e-3


def test_gradients_under_dropout(tmp_path: Path) -> None:
    """So little of it that nothing is dropped, but its way is taken."""
    model, apart = compiled_in_part(tmp_path / "a", dropout=1e-9), plain(tmp_path / "b")
    check_step(*(one_step(m) for m in (model, apart)), IDS.numel())


def refuses_meta(module: nn.Module, args: Any, out: Tensor) -> None:
    assert out.device.type != "meta", "it looks at a value"


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"], ["o_proj"], ["down_proj"]]),
        ("phi3", [["qkv_proj"], ["gate_up_proj"], ["o_proj"], ["down_proj"]]),
        ("gemma3_text", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"], ["o_proj"], ["down_proj"]]),
    ],
)
def test_layers_that_share_an_input_are_found(
    family: str, groups: list[list[str]], fake: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta; or, for models that look at a value there, with fake tensors."""
    monkeypatch.setattr(shared_input, "FakeTensorMode", FakeTensorMode if fake else None)
    model = tiny_model(family)
    if fake:
        model.model.embed_tokens.register_forward_hook(refuses_meta)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers.0." in name]
    found = [[name.rpartition(".")[2] for name in group] for group in layers_with_one_input(model, names)]
    assert sorted(found) == sorted(groups)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_layers_of_two_blocks_are_never_together(tmp_path: Path) -> None:
    model = build(tmp_path / "base", choice="separate", layers=2)
    keys = [name for name, m in model.named_modules() if isinstance(m, LoRALinear) and name.endswith("k_proj")]
    fuse_adapters(model, "fused", [keys])
    assert len(keys) == len({id(model.get_submodule(name).fused) for name in keys}) == 2


def test_a_block_that_the_compiler_cannot_take_whole(tmp_path: Path) -> None:
    """One layer of a group runs before the break, the others after it."""
    torch._dynamo.reset()  # what is compiled already would do: a hook that is added later is not looked for
    model, apart = compiled_in_part(tmp_path / "a"), plain(tmp_path / "b")
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        check_step(*(one_step(m) for m in (model, apart)), IDS.numel())
    assert torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["frames"]["total"] < 40


def test_a_model_that_cannot_be_looked_at_has_every_layer_alone() -> None:
    model = tiny_model("llama")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    model.model.rotary_emb.register_forward_pre_hook(lambda *_: float(model.lm_head.weight.sum()))
    assert layers_with_one_input(model, names) == [[name] for name in names]


def test_one_of_a_group_can_be_called_alone(tmp_path: Path) -> None:
    """And the others twice: what was computed for them before is not what they would compute now."""
    model = compiled(tmp_path / "base")
    attention, x = model.model.layers[0].self_attn, torch.randn(2, 3, model.config.hidden_size)
    group = attention.q_proj.fused
    for group_ in (group, model.model.layers[0].mlp.gate_proj.fused):
        group_.kept_fresh = True
    refresh([group])
    alone = attention.v_proj(x).detach()
    run = torch.compile(lambda x: (attention.v_proj(x), attention.v_proj(x)), backend="aot_eager")
    for out in run(x):
        close(out.detach(), alone)


def test_what_cannot_be_fused_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DoRA needs base and update apart"):
        build(tmp_path / "base", use_dora=True)
    with pytest.raises(ValueError, match="Allowed: auto, fused, separate"):
        KernelsConfig(lora="merged")


def test_auto_on_a_cpu_leaves_layers_alone(tmp_path: Path) -> None:
    model = build(tmp_path / "base", choice="auto")
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and isinstance(m, LoRALinear)]
    assert layers
    assert all(m.fused is None for m in layers)
