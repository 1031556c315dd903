"""A kernel library of another package: what it has to write, and where its name turns up."""

from __future__ import annotations

import copy
import json
import pickle
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from automodel_trainer import AutoModelForCausalLM
from automodel_trainer.callbacks.ledger_text import ledger_rows
from automodel_trainer.models.kernels import (
    Fp8Recipe,
    KernelLibrary,
    KernelsConfig,
    Offer,
    apply_kernels,
    kernels_in_use,
    register,
    registry,
)
from automodel_trainer.models.kernels.config import FASTEST
from automodel_trainer.models.kernels.library import PARTS
from automodel_trainer.models.kernels.mlp import ACTIVATIONS, GatedMLP
from automodel_trainer.models.kernels.norm import Norm
from automodel_trainer.models.kernels.rope import restore_rope, rotate_half
from automodel_trainer.models.lora import LoRAConfig, apply_lora, lora_of
from automodel_trainer.models.lora.fuse import Fusion
from automodel_trainer.models.record import ATTRIBUTE, recorded
from automodel_trainer.modules import CausalLMModule
from automodel_trainer.trainer import Trainer
from tests.limits import check_losses, check_step
from tests.tiny import tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Fake(KernelLibrary):
    """Everything in plain torch, on a CPU, counted."""

    name = "fake"
    title = "Fake Kernels"
    devices = ("cpu",)
    offers = {
        "norm": Offer(cost="nothing but time"),
        "activation": Offer(dtypes=(torch.float32,), cuts_graph=True),
        "rope": Offer(),
        "linear": Offer(),
        "loss": Offer(cuts_graph=True),
    }
    recipes = {"fake8": Fp8Recipe(multiple=8)}

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def norm(self, norm: Norm) -> Any:
        if norm.centred:
            return "it has a mean"

        def normed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            self.calls["norm"] += 1
            return norm.reference(x, weight, bias)

        return normed

    def activation(self, mlp: GatedMLP) -> Any:
        def gated(gate: Tensor, up: Tensor) -> Tensor:
            self.calls["activation"] += 1
            return ACTIVATIONS[mlp.activation](gate) * up

        return gated

    def rope(self) -> Any:
        def rotated(*args: Tensor) -> tuple[Tensor, Tensor]:
            self.calls["rope"] += 1
            return rotate_half(*args)

        return rotated

    def linear(self, layer: nn.Linear, recipe: str | None) -> Any:
        if layer.out_features == 64:
            return "it has 64 outputs"

        def multiplied(x: Tensor, weight: Tensor) -> Tensor:
            self.calls["linear"] += 1
            return F.linear(x, weight)

        return multiplied

    def loss(self) -> Any:
        def summed(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
            self.calls["loss"] += 1
            return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")

        return summed


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    registry.libraries()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    library = Fake()
    register(library)
    yield library
    restore_rope(tiny_model("llama"))


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(5, 260, (2, 16), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_model_computes_with_it(fake: Fake) -> None:
    plain, model = tiny_model("llama"), tiny_model("llama")
    wanted = step(plain)  # first: `rope` is for all models of the same Python module
    apply_kernels(model, KernelsConfig(norm="fake", activation="fake", rope="fake", linear="fake"), CPU)
    check_step(step(model), wanted, 32)
    # two blocks: two norms each and one at the end; gate and up have 64 outputs
    assert fake.calls == {"norm": 5, "activation": 2, "rope": 2, "linear": 10}
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_layer_that_does_not_suit_is_named_with_the_reason(fake: Fake) -> None:
    model = tiny_model("llama")
    texts = apply_kernels(model, KernelsConfig(linear="fake", fp8="fake8", norm="fake"), CPU).texts
    assert texts["linear"].startswith("Fake Kernels (10 layers); not model.layers.0.mlp.gate_proj (it has 64 outputs)")
    assert texts["norm"] == "Fake Kernels (5 norms)"
    with pytest.raises(ValueError, match=r"norm='fake' would change nothing: .*\(it has a mean\)"):
        apply_kernels(tiny_model("gpt_neox"), KernelsConfig(norm="fake"), CPU)
    with pytest.raises(ValueError, match=r"rope='fake' does not fit: .*another way than by halves of a head"):
        apply_kernels(tiny_model("glm4"), KernelsConfig(rope="fake"), CPU)
    half = tiny_model("llama").bfloat16()
    apply_kernels(half, KernelsConfig(activation="fake"), CPU)
    with pytest.raises(ValueError, match=r"activation='fake': this kernel computes in fp32, and the run in .*bfloat16"):
        step(half)


def test_an_unavailable_one_is_refused_in_words(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise ImportError("no module named fake")

    with pytest.raises(ValueError, match=r"norm='fake' needs a CPU, and this run is on cuda\. Leave it at 'auto'"):
        apply_kernels(tiny_model("llama"), KernelsConfig(norm="fake", attention="eager"), GPU)
    with pytest.raises(ValueError, match=r"fp8='fake8' is a recipe of Fake Kernels: set linear='fake'\. With linear="):
        apply_kernels(tiny_model("llama"), KernelsConfig(fp8="fake8"), CPU)
    with pytest.raises(ValueError, match=r"fp8='e8' is not for linear='fake'\. Allowed: fake8, null"):
        apply_kernels(tiny_model("llama"), KernelsConfig(linear="fake", fp8="e8"), CPU)
    monkeypatch.setattr(fake, "load", load)
    monkeypatch.setattr(fake, "requirement", "Fake Kernels: pip install fake")
    for part in ("norm", "loss"):
        with pytest.raises(ValueError, match=rf"{part}='fake' needs Fake Kernels: pip install fake \(no module named"):
            apply_kernels(tiny_model("llama"), KernelsConfig(**{part: "fake"}), CPU)  # type: ignore[arg-type]
    monkeypatch.setitem(FASTEST, "norm", "fake")
    model = tiny_model("llama")
    assert apply_kernels(model, KernelsConfig(attention="eager"), GPU).chosen["norm"] == "compile"


def test_it_is_a_choice_by_name(fake: Fake) -> None:
    parser = ArgumentParser()
    parser.add_argument("--kernels", type=KernelsConfig)
    for lines in (["norm: fake", "lora: widened"], ["norm: fake", "lora: fused"]):
        parsed = parser.instantiate_classes(parser.parse_string("\n  ".join(["kernels:", *lines])))
        assert parsed.kernels == KernelsConfig(norm="fake", lora="fused")
    with pytest.raises(ValueError, match=r"kernels norm='fak' is unknown\. Allowed: auto, compile, liger, te, fake\."):
        KernelsConfig(norm="fak")
    with pytest.raises(
        ValueError, match=r"kernels loss='te' is unknown\. Allowed: auto, chunked, whole, liger, fake\."
    ):
        KernelsConfig(loss="te")


def test_a_run_counts_its_loss_and_the_ledger_names_it(fake: Fake, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    ids = torch.randint(5, 260, (2, 16))
    losses = []
    for kernels in (KernelsConfig(), KernelsConfig(norm="fake", loss="fake")):
        module = CausalLMModule(tmp_path / "base", kernels=kernels)
        trainer = Trainer(
            accelerator="cpu", devices=1, strategy="ddp", max_steps=2, log_every_n_steps=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path, precision="fp32",
        )  # fmt: skip
        trainer.fit(module, [[{"input_ids": ids, "labels": ids}]] * 2)
        losses.append(float(trainer.callback_metrics["train_loss"]))
    check_losses(losses[1:], losses[:1], 32)
    assert fake.calls == {"norm": 10, "loss": 2}
    in_use = kernels_in_use(module.model)
    assert in_use.texts["loss"] == "Fake Kernels"
    assert in_use.costs(compiled=False) == {"norm": "nothing but time"}
    assert in_use.costs(compiled=True) == {"norm": "nothing but time", "loss": "compiled blocks are cut there"}
    rows = dict(ledger_rows(json.loads((tmp_path / "ledger.json").read_text())))
    assert rows["kernels"].startswith("loss: Fake Kernels; norm: Fake Kernels (5 norms); activation: the model's own")
    assert rows["kernel costs"] == "norm: nothing but time"


def test_the_library_of_the_docs(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {"__name__": "docs"})
    rms = SimpleNamespace(rms_norm=lambda x, weight, eps: Norm(False, eps).reference(x, weight, None))
    monkeypatch.setitem(sys.modules, "my_norms", rms)  # type: ignore[arg-type]
    model = tiny_model("llama").bfloat16()
    texts = apply_kernels(model, KernelsConfig(norm="mine", attention="eager"), GPU).texts
    assert texts["norm"] == "My Norms (5 norms)"
    assert step(model)[0].isfinite()
    monkeypatch.setitem(sys.modules, "my_norms", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"norm='mine' needs My Norms: pip install my-norms \("):
        apply_kernels(model, KernelsConfig(norm="mine", attention="eager"), GPU)


def test_names_are_unique_and_parts_are_known(fake: Fake) -> None:
    register(fake)  # the same object again
    for name in ("fake", "liger", "compile", "auto"):
        other = Fake()
        other.name = name
        with pytest.raises(ValueError, match=f"is called '{name}' already"):
            register(other)
    other = Fake()
    other.name, other.offers = "another", {"norms": Offer()}
    with pytest.raises(ValueError, match=r"'another' offers norms\. Parts are: attention, loss, norm"):
        register(other)


def test_entry_points(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Fake()
    other.name = "installed"
    entry = SimpleNamespace(name="installed", load=lambda: other)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if "kernels" in group else [])
    registry._load_entry_points.cache_clear()
    assert KernelsConfig(norm="installed").norm == "installed"
    registry._load_entry_points.cache_clear()


def test_every_library_of_the_folder_keeps_the_contract() -> None:
    names = [library.name for library in registry.libraries()]
    assert {"liger", "te", "flex", "cudnn", "flash"} <= set(names)
    for library in registry.libraries():
        assert library.offers
        assert library.offers.keys() <= set(PARTS)
        assert all(type(library).__dict__.get(part) for part in library.offers), library.name
        assert library.title
        assert copy.deepcopy(library) is library
    for part, name in FASTEST.items():
        library = registry.find(part, name)
        assert library is None or not library.offers[part].cuts_graph, "auto never cuts compiled blocks"


def test_no_other_file_names_a_library() -> None:
    """In quotes, as a comparison would have it; docstrings may."""
    root = Path(registry.__file__).parents[2]
    files = [file for file in root.rglob("*.py") if "libraries" not in file.parts]
    assert len(files) > 100
    for file in files:
        text = file.read_text()
        assert not any(f'"{name}"' in text or f"'{name}'" in text for name in ("liger", "te")), file


def test_the_record_is_copied_with_the_model_and_is_all_that_is_attached(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, lora=LoRAConfig(rank=3), kernels=KernelsConfig())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert vars(model).keys() - vars(plain).keys() == {ATTRIBUTE, "save_pretrained", "push_to_hub"}
    copied = copy.deepcopy(model)
    assert copied.save_pretrained.__self__ is copied
    config = lora_of(copied)
    assert config is not None
    assert config.rank == 3
    assert config is not lora_of(model)
    assert kernels_in_use(copied) == kernels_in_use(model)
    assert getattr(copied, ATTRIBUTE) is not getattr(model, ATTRIBUTE)
    assert pickle.loads(pickle.dumps(getattr(model, ATTRIBUTE))).find(LoRAConfig) == config
    assert ATTRIBUTE not in "".join(model.state_dict())
    assert "rank=3" in repr(getattr(model, ATTRIBUTE))
    plain = tiny_model("llama")
    assert recorded(plain, LoRAConfig) is None
    assert ATTRIBUTE not in vars(plain)
    apply_lora(plain, LoRAConfig(rank=2))
    assert lora_of(plain).rank == 2  # type: ignore[union-attr]


def test_kernels_never_see_tensors_without_values(fake: Fake) -> None:
    """Those of GPU libraries would read their memory. Layers that share an input are found all the same."""
    model = tiny_model("llama")
    apply_lora(model, LoRAConfig(rank=2))
    apply_kernels(model, KernelsConfig(norm="fake", activation="fake", rope="fake", lora="fused"), CPU)
    assert not fake.calls
    fusion = recorded(model, Fusion)
    assert fusion is not None
    assert (fusion.groups or [[]])[0][:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
