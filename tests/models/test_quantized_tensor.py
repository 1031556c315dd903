"""Weights packed as NF4 beyond torchao's own two dimensions: fused experts, and bitsandbytes' packing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from automodel_trainer import AutoModelForCausalLM
from automodel_trainer.models.kernels import KernelsConfig
from automodel_trainer.models.kernels.experts import experts_to_fp8, swap_experts
from automodel_trainer.models.lora import LoRAConfig, adapters
from automodel_trainer.models.quantization.quantize import is_quantized
from automodel_trainer.models.quantization.quantized_tensor import QuantizedTensor, quantize
from tests.beside import folder_of, use
from tests.harness import close, make_strategy, relative_error
from tests.limits import CHAIN
from tests.matrix import more
from tests.models.test_lora_layouts import train
from tests.models.test_qlora import with_libraries
from tests.pool import RankPool
from tests.routers import separated
from tests.tiny import tiny_model

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
IDS = torch.arange(6, 70).view(2, 32)
LIBRARIES = {"nf4": "torchao", "bnb-nf4": "bitsandbytes"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    tiny_model("llama").save_pretrained(folder / "dense")
    separated(tiny_model("qwen3_moe", **MOE)).save_pretrained(folder / "moe")
    tiny_model("gpt_oss", num_local_experts=4).save_pretrained(folder / "transposed")
    return folder


def build(folder: Path, packing: str | None, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, lora=LoRAConfig(rank=4, quantize=packing), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", LIBRARIES)
@pytest.mark.parametrize("shape", [(64, 32), (8, 16, 24), (256, 512), (4, 256, 256)])
def test_numbers_are_the_library_s_and_shards_are_parts_of_them(packing: str, shape: tuple[int, ...]) -> None:
    use(LIBRARIES[packing])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale_block = 256 if weight.numel() >= 2**17 else 4
    packed = quantize(weight, packing, scale_block)
    whole = packed.get_original_weight()
    if packing == "bnb-nf4":
        import bitsandbytes.functional as bnb

        # In rows of a block: bitsandbytes' CPU kernel misreads a weight whose rows end inside of one.
        rows, nested = weight.view(-1, 64), scale_block == 256
        codes, state = bnb.quantize_4bit(rows, quant_type="nf4", compress_statistics=nested)
        expected = bnb.dequantize_4bit(codes, state)
    else:
        from torchao.quantization import NF4Tensor

        expected = NF4Tensor.from_tensor(weight.reshape(shape[0], -1), 64, scale_block).get_original_weight()
    assert torch.equal(whole.flatten(), expected.flatten())
    assert relative_error(whole, weight) < 0.15
    assert (packed.shape, packed.dtype) == (weight.shape, weight.dtype)
    for count in (2, 4):
        shards = [packed.shard(index, count) for index in range(count)]
        assert torch.equal(torch.cat([shard.get_original_weight() for shard in shards]), whole)
        held = sum(part.nbytes for name in ("codes", "scales", "factors") for part in [getattr(shards[0].parts, name)])
        assert held < 0.7 * weight.numel() / count


@pytest.mark.parametrize("packing", LIBRARIES)
@pytest.mark.exact
def test_linear_is_that_of_the_unpacked_weight_and_keeps_no_dense_copy(packing: str) -> None:
    use(LIBRARIES[packing])
    weight, bias = torch.randn(64, 32), torch.randn(64)
    packed = torch.nn.Parameter(quantize(weight, packing, 4), requires_grad=False)
    assert isinstance(packed, QuantizedTensor)
    dense = packed.get_original_weight()
    x = torch.randn(3, 5, 32, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = F.linear(x, packed, bias)
    assert torch.equal(out, F.linear(x, dense) + bias)
    assert [type(t) for t in saved] == [type(packed)]
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(F.linear(x, dense, bias).square().sum(), x)
    close(gradient, expected)
    half = packed.to(torch.bfloat16)
    assert torch.equal(half.get_original_weight(), dense.bfloat16())
    with pytest.raises(NotImplementedError, match="get_original_weight"):
        packed + 1


CASES = [("nf4", "moe"), ("nf4", "transposed"), ("bnb-nf4", "moe"), ("bnb-nf4", "dense")]


@pytest.mark.parametrize(("packing", "family"), CASES)
def test_logits_and_gradients_are_those_of_the_unpacked_base(bases: Path, packing: str, family: str) -> None:
    use(LIBRARIES[packing])
    model, plain = build(bases / family, packing), build(bases / family, None)
    kinds = set()
    for one, other in zip(adapters(model), adapters(plain)):
        weight = one.module._parameters[one.parameter]
        assert is_quantized(weight)  # type: ignore[arg-type]
        kinds.add(weight.ndim)  # type: ignore[union-attr]
        full = other.module._parameters[other.parameter]
        assert relative_error(weight.get_original_weight(), full.detach()) < 0.15  # type: ignore[union-attr]
        full.data = weight.get_original_weight()  # type: ignore[union-attr]
        for adapter in (one, other):
            torch.nn.init.constant_(adapter.b.weight, 0.02)
    assert kinds == ({2} if family == "dense" else {2, 3})
    close(model(IDS).logits, plain(IDS).logits)
    for one in (model, plain):
        one(IDS).logits.square().mean().backward()
    for one, other in zip(adapters(model), adapters(plain)):
        close(one.a.weight.grad, other.a.weight.grad, CHAIN * IDS.numel())
        close(one.b.weight.grad, other.b.weight.grad, CHAIN * IDS.numel())


@pytest.mark.parametrize(
    ("packing", "layouts"),
    [
        ("nf4", [("fsdp2", 2), ("hsdp:dp_replicate=2", 4), ("fsdp2:ep=2", 2)]),
        ("bnb-nf4", [("ddp", 2), ("fsdp2", 4), ("fsdp2:cp=2", 2)]),
        ("nf4", [("fsdp2:ep=2", 4)]),
        more("nf4", [("fsdp2", 4)]),
    ],
)
def test_ranks(pool: RankPool, bases: Path, packing: str, layouts: list[tuple[str, int]]) -> None:
    use(LIBRARIES[packing])
    job = (with_libraries, [LIBRARIES[packing]], train)
    of_model = ("fp32", bases / "moe", {"quantize": packing})
    (one,) = pool.run(1, *job, "fsdp2", 1, *of_model)
    for spec, world_size in layouts:
        for result in pool.run(world_size, *job, spec, world_size, *of_model):
            assert result["losses"] == pytest.approx(one["losses"], rel=1e-5), spec
            assert result["norms"] == pytest.approx(one["norms"], rel=1e-4), spec
    (exact,) = pool.run(1, train, "fsdp2", 1, "fp32", bases / "moe", {})
    assert one["losses"] != exact["losses"]
    assert one["losses"] == pytest.approx(exact["losses"], rel=0.02)


def train_in_fp8(spec: str, world_size: int, folder: Path) -> Any:
    """`train` with frozen experts that are held in fp8, as on a GPU with `kernels: {fp8: …}`."""

    def swap(model: Any) -> Any:
        swapped, left = swap_experts(model)
        assert swapped
        assert not experts_to_fp8(model, swapped)
        return swapped, left

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("automodel_trainer.models.kernels.choose.swap_experts", swap)
        return train(spec, world_size, "fp32", folder, {}, KernelsConfig(experts="grouped"))


def test_experts_held_in_fp8(pool: RankPool, bases: Path) -> None:
    """Near the run without fp8, and the same on every layout; a cast of rows may round otherwise after a sum."""
    (one,) = pool.run(1, train_in_fp8, "fsdp2", 1, bases / "moe")
    (exact,) = pool.run(1, train, "fsdp2", 1, "fp32", bases / "moe", {})
    assert one["losses"] != exact["losses"]
    assert one["losses"] == pytest.approx(exact["losses"], rel=0.02)
    for spec, world_size in (("fsdp2", 2), ("fsdp2:ep=2", 2)):
        for result in pool.run(world_size, train_in_fp8, spec, world_size, bases / "moe"):
            assert result["losses"] == pytest.approx(one["losses"], rel=1e-3), spec
            assert result["held"] < 0.6


def build_on(spec: str, world_size: int, folder: Path, packing: str) -> str:
    use(LIBRARIES[packing])
    try:
        build(folder, packing, strategy=make_strategy(spec, world_size))
    except ValueError as error:
        return str(error)
    return "built"


@pytest.mark.parametrize(
    ("spec", "world_size", "message"),
    [
        ("fsdp2", 3, "cannot be quantized as nf4 in 3 shards"),
        ("fsdp2:tp=2", 2, "tensor parallel cannot cut it. Set tp=1"),
    ],
)
def test_layouts_that_cannot_cut_a_packed_weight_say_so(
    pool: RankPool, bases: Path, spec: str, world_size: int, message: str
) -> None:
    use("torchao")
    assert all(message in said for said in pool.run(world_size, build_on, spec, world_size, bases / "moe", "nf4"))


@pytest.mark.parametrize("packing", LIBRARIES)
def test_a_library_that_is_not_installed_is_named(bases: Path, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (LIBRARIES[packing], "torchao.quantization", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"quantize='{packing}' needs {LIBRARIES[packing]}: pip install"):
        build(bases / "dense", packing)


def test_the_kernel_for_gpus_computes_what_torchao_does() -> None:
    if not all(folder_of(name).is_dir() for name in ("triton", "torchao")):
        pytest.skip("needs triton and torchao beside the environment (`make venv`)")
    command = [sys.executable, "-m", "tests.models.nf4_on_cpu"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1]) == 0
