"""Experts that are held as an mxfp4 checkpoint has them, against the same checkpoint read dense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from automodel_trainer import AutoModelForCausalLM
from automodel_trainer.checkpoint.merge import merge
from automodel_trainer.distributed._dtensor import local_tensor
from automodel_trainer.models.kernels import KernelsConfig
from automodel_trainer.models.lora import LoRAConfig, apply_lora
from automodel_trainer.models.quantization import mxfp4
from automodel_trainer.models.quantization.quantized_tensor import QuantizedTensor
from automodel_trainer.models.quantization_config import ReadDense
from automodel_trainer.models.record import recorded
from automodel_trainer.strategies.tensor.adapters import cut_adapters
from automodel_trainer.strategies.tensor.plan import TensorPlan
from tests.harness import close, make_strategy, relative_error
from tests.limits import CHAIN
from tests.models.test_lora_layouts import fit, train
from tests.models.test_lora_peft import disturb
from tests.models.test_quantized_checkpoints import IDS, fp8_folder, mxfp4_folder
from tests.pool import RankPool
from tests.tiny import tiny_model

STACKED = ("gate_up_proj", "down_proj")
NO_EXPERTS = {"target_modules": ["q_proj", "o_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mxfp4_folder(tmp_path_factory.mktemp("mxfp4"))


def build(folder: Path, quantize: Any = "mxfp4", lora: dict[str, Any] | None = None, **options: Any) -> Any:
    options.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        folder, lora=LoRAConfig(rank=4, quantize=quantize, **(lora or {})), **options
    )


def held_in(model: nn.Module) -> dict[str, QuantizedTensor]:
    """What this rank holds of the quantized weights."""
    found = {name: local_tensor(p) for name, p in model.named_parameters() if name.endswith(STACKED)}
    assert all(isinstance(weight, QuantizedTensor) for weight in found.values())
    return found  # type: ignore[return-value]


def check_held(held: dict[str, QuantizedTensor], folder: Path, experts: slice) -> None:
    """Bit for bit what the file has of these experts."""
    assert held
    tensors = load_file(folder / "model.safetensors")
    for name, weight in held.items():
        assert torch.equal(weight.parts.codes, tensors[f"{name}_blocks"][experts].flatten(-2))
        assert torch.equal(weight.parts.scales, tensors[f"{name}_scales"][experts])
        assert weight.parts.codes.nbytes + weight.parts.scales.nbytes <= 0.6 * weight.numel()


@pytest.mark.parametrize("experts", ["transformers", "grouped"])
@pytest.mark.parametrize("lora", [{}, NO_EXPERTS, {"target_modules": ["gate_up_proj"]}], ids=["all", "none", "one"])
@pytest.mark.exact
def test_as_the_dense_model(folder: Path, lora: dict[str, Any], experts: Any) -> None:
    kernels = KernelsConfig(experts=experts)
    model, plain = (build(folder, quantize, lora, kernels=kernels) for quantize in ("mxfp4", None))
    held = held_in(model)
    assert len(held) == 4
    check_held(held, folder, slice(None))
    assert recorded(model, ReadDense) is None
    assert all(torch.equal(w.get_original_weight(), plain.get_parameter(name)) for name, w in held.items())
    for one in (model, plain):
        disturb(one)
        one(input_ids=IDS, labels=IDS).loss.backward()
    close(model(IDS).logits, plain(IDS).logits)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            close(model.get_parameter(name).grad, parameter.grad, CHAIN * IDS.numel())


def test_every_code_under_every_exponent() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).flatten(-2)
    exponents = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16)
    values = torch.tensor(mxfp4.FP4, dtype=torch.float64)
    both = torch.stack((values[(codes & 15).int()], values[(codes >> 4).int()]), -1).flatten(-2)
    exact = (both * 2.0 ** (torch.arange(256, dtype=torch.float64).view(256, 1) - 127))[:, :255].mT
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = mxfp4.dequantize(mxfp4.parts(codes, exponents), dtype)
        assert torch.equal(found[..., :255], exact.to(dtype))
        assert not found[..., 255].isfinite().any()  # which stands for no number


# --- layouts ----------------------------------------------------------------------------------------------------------


def held_on(spec: str, world_size: int, folder: Path) -> dict[str, QuantizedTensor]:
    return held_in(build(folder, strategy=make_strategy(spec, world_size), dtype=None))


@pytest.mark.parametrize(
    ("spec", "world_size", "experts"),
    [
        ("fsdp2", 2, [(0, 2), (2, 4)]),
        ("fsdp2:ep=2", 2, [(0, 2), (2, 4)]),
        ("fsdp2:ep=2", 4, [(0, 1), (2, 3), (1, 2), (3, 4)]),
        ("hsdp:dp_replicate=2", 4, [(0, 2), (2, 4), (0, 2), (2, 4)]),
        ("ddp", 2, [(0, 4), (0, 4)]),
        ("fsdp2:tp=2", 2, [(0, 4), (0, 4)]),  # the model's plan cuts no experts
    ],
)
def test_ranks(
    pool: RankPool, folder: Path, dense: dict[str, Any], spec: str, world_size: int, experts: list[tuple[int, int]]
) -> None:
    for held, (first, end) in zip(pool.run(world_size, held_on, spec, world_size, folder), experts, strict=True):
        check_held(held, folder, slice(first, end))
    for result in pool.run(world_size, train, spec, world_size, "fp32", folder, {"quantize": "mxfp4"}):
        assert result["losses"] == pytest.approx(dense["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(dense["norms"], rel=1e-4)
        trained = [torch.cat([t.flatten() for t in run["trained"].values()]) for run in (result, dense)]
        assert relative_error(*trained) < 1e-4


@pytest.fixture(scope="module")
def dense(pool: RankPool, folder: Path) -> dict[str, Any]:
    """One device, with the experts dense."""
    (result,) = pool.run(1, train, "fsdp2", 1, "fp32", folder, {})
    return result  # type: ignore[no-any-return]


def refuse_on(world_size: int, folder: Path) -> None:
    with pytest.raises(ValueError, match="cannot be quantized as mxfp4 in 3 shards: use fewer ranks"):
        build(folder, lora=NO_EXPERTS, strategy=make_strategy("fsdp2", world_size), dtype=None)


def test_experts_that_do_not_divide(pool: RankPool, folder: Path) -> None:
    pool.run(3, refuse_on, 3, folder)


def test_a_tensor_parallel_plan_for_experts(folder: Path) -> None:
    model = build(folder, lora=NO_EXPERTS)
    plan = TensorPlan({}, {id(model.model.layers[1].mlp.experts.down_proj): Shard(1)}, set())
    with pytest.raises(ValueError, match=r"down_proj of model.layers.1.mlp.experts is held quantized.*Set tp=1"):
        cut_adapters(model, plan)


# --- compiled, trained, merged ----------------------------------------------------------------------------------------


def test_a_compiled_backward_keeps_no_dense_experts(folder: Path) -> None:
    model, plain = (build(folder, quantize, kernels=KernelsConfig(experts="grouped")) for quantize in ("mxfp4", None))
    shapes = {weight.numel() for weight in held_in(model).values()}
    model.compile(backend="aot_eager_decomp_partition")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    close(loss, plain(input_ids=IDS, labels=IDS).loss)
    assert kept
    assert not [t.shape for t in kept if t.is_floating_point() and t.numel() in shapes]


@pytest.mark.exact
def test_resume_export_and_merge(folder: Path, tmp_path: Path) -> None:
    """Each is what it would be with dense experts, and a run may go on with the other kind."""
    options: dict[str, Any] = {"dropout": 0.0, "modules_to_save": []}
    straight = fit(folder, tmp_path / "a", 4, 4, **options)
    half = fit(folder, tmp_path / "b", 4, 2, quantize="mxfp4", **options)
    rest = fit(folder, tmp_path / "c", 4, 4, half["checkpoint"], quantize="mxfp4", **options)
    again = fit(folder, tmp_path / "d", 4, 4, half["checkpoint"], **options)
    assert half["losses"] + rest["losses"] == pytest.approx(straight["losses"], rel=1e-5)
    assert again["losses"] == pytest.approx(rest["losses"], rel=1e-5)
    check_held(held_in(rest["module"].model), folder, slice(None))
    ledger = json.loads((tmp_path / "c" / "ledger.json").read_text())
    assert "mxfp4 base" in ledger["model"]["lora"]
    assert ledger["model"]["read_dense"] is None

    expected = rest["module"].model.eval()(IDS).logits
    rest["trainer"].save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(build_plain(folder), str(tmp_path / "adapter")).eval()
    close(theirs(IDS).logits, expected, CHAIN * IDS.numel())
    merge(tmp_path / "adapter", tmp_path / "merged", folder, torch.float32)
    for merged in (tmp_path / "merged", rest["trainer"].merge_and_save(tmp_path / "other", dtype=torch.float32)):
        assert "quantization_config" not in json.loads((merged / "config.json").read_text())
        loaded = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        close(loaded(IDS).logits, expected, CHAIN * IDS.numel())


def build_plain(folder: Path) -> Any:
    dequantize = transformers.Mxfp4Config(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=dequantize).float()


# --- refused ----------------------------------------------------------------------------------------------------------


def test_other_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mxfp4 checkpoint as they are, and .*fp8 is quantized by fp8.*'nf4'"):
        build(fp8_folder(tmp_path))
    with pytest.raises(ValueError, match=r"whole is not quantized.*'nf4'"):
        build(folder.parent / "whole")
    with pytest.raises(ValueError, match="this model has other weights already"):
        apply_lora(tiny_model("gpt_oss"), LoRAConfig(quantize="mxfp4"))
    with pytest.raises(ValueError, match="this model has other weights already"):
        AutoModelForCausalLM.from_config(tiny_model("gpt_oss").config, lora=LoRAConfig(quantize="mxfp4"))


def test_experts_that_are_trained_are_dense(folder: Path) -> None:
    model = build(folder, lora={**NO_EXPERTS, "modules_to_save": ["layers.0.mlp.experts"]})
    kinds = [isinstance(p, QuantizedTensor) for name, p in model.named_parameters() if name.endswith(STACKED)]
    assert kinds == [False, False, True, True]
    assert recorded(model, ReadDense) == ReadDense("mxfp4")
