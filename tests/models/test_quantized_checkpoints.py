"""Checkpoints that hold codes and scales, against the same loaded and dequantized by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from automodel_trainer import AutoModelForCausalLM
from automodel_trainer.checkpoint.export import export_pretrained
from automodel_trainer.checkpoint.merge import merge
from automodel_trainer.models.files import slices_of
from automodel_trainer.models.lora import LoRAConfig
from automodel_trainer.models.lora.adapter_files import save_adapter
from automodel_trainer.models.quantization.checkpoint import check_dense
from automodel_trainer.models.quantization.dense import Fp8Weight, Mxfp4Weight
from automodel_trainer.models.quantization_config import ReadDense
from automodel_trainer.models.record import recorded
from tests.harness import make_strategy
from tests.models.test_lora_peft import disturb
from tests.pool import RankPool
from tests.routers import separated
from tests.tiny import tiny_config, tiny_model

E4M3 = torch.float8_e4m3fn
IDS = torch.arange(6, 30).view(2, 12)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "hidden_size": 64}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}


def quantize_blocks(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """fp8 codes and the scale of each block; blocks at the edges may be smaller."""
    rows, columns = (-(-n // size) for n in weight.shape)
    codes, scales = torch.empty_like(weight, dtype=E4M3), torch.zeros(rows, columns)
    for i in range(rows):
        for j in range(columns):
            at = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            scales[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[i, j]).to(E4M3)
    return codes, scales


def rewrite(source: Path, target: Path, quantization: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def fp8_folder(tmp_path: Path, quantization: dict[str, Any] = BLOCKS) -> Path:
    tiny_model("qwen3_moe", **MOE).to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    for name in [name for name in tensors if "proj.weight" in name]:
        tensors[name], tensors[name + "_scale_inv"] = quantize_blocks(tensors[name].float(), 32)
    return rewrite(tmp_path / "whole", tmp_path / "fp8", quantization, tensors)


def mxfp4_folder(tmp_path: Path) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 16}
    model = separated(tiny_model("gpt_oss", **sizes, num_experts_per_tok=2)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32, 16)
        tensors[name + "_blocks"] = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        tensors[name + "_scales"] = torch.randint(118, 124, shape[:-1], dtype=torch.uint8, generator=generator)
    return rewrite(tmp_path / "whole", tmp_path / "mxfp4", {"quant_method": "mxfp4"}, tensors)


def logits_of(folder: Path, auto: Any, **options: Any) -> Tensor:
    return auto.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()(IDS).logits.detach()


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_logits_are_those_of_transformers(tmp_path: Path, method: str) -> None:
    folder = {"fp8": fp8_folder, "mxfp4": mxfp4_folder}[method](tmp_path)
    dequantize = {"fp8": transformers.FineGrainedFP8Config, "mxfp4": transformers.Mxfp4Config}[method](dequantize=True)
    expected = logits_of(folder, transformers.AutoModelForCausalLM, quantization_config=dequantize)
    assert torch.equal(logits_of(folder, AutoModelForCausalLM), expected)

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert recorded(model, ReadDense) == ReadDense(method)
    export_pretrained(model, tmp_path / "exported", source=folder)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert "quantization_config" not in config
    assert torch.equal(logits_of(tmp_path / "exported", transformers.AutoModelForCausalLM), expected)

    merge(folder, tmp_path / "dense")
    assert torch.equal(logits_of(tmp_path / "dense", transformers.AutoModelForCausalLM), expected)


def weights_on(spec: str, folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, make_strategy(spec, 2))
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.state_dict().items()}


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_every_rank_reads_its_shards(pool: RankPool, tmp_path: Path, method: str) -> None:
    folder = {"fp8": fp8_folder, "mxfp4": mxfp4_folder}[method](tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for spec in ("fsdp2", "fsdp2:tp=2"):
        for found in pool.run(2, weights_on, spec, folder):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected), spec


def test_an_adapter_is_merged_into_dense_weights(tmp_path: Path) -> None:
    folder = fp8_folder(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, lora=LoRAConfig(rank=2))
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", folder, torch.float32)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-5)


def test_scales_of_every_shape(tmp_path: Path) -> None:
    """For the whole weight, for rows, and for blocks that end inside the weight; as floats and as exponents."""
    weight, stack = torch.randn(80, 48), torch.randn(3, 32, 64)
    codes, blocks = quantize_blocks(weight, 32)
    exponents = torch.randint(120, 130, (80, 2), dtype=torch.uint8)
    packed = torch.randint(-128, 127, (4, 32), dtype=torch.int8)
    tensors = {
        "whole": torch.tensor(0.5), "one": torch.tensor([0.5]), "rows": torch.rand(80), "columns": torch.rand(80, 1),
        "blocks": blocks, "exponents": exponents, "powers": (exponents.float() - 127).exp2().to(torch.float8_e8m0fnu),
        "codes": codes, "stack": stack.to(E4M3), "experts": torch.rand(3), "packed": packed,
        "of_packed": torch.rand(4, 2),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    slices = slices_of([tmp_path / "a.safetensors"])
    grid = blocks.repeat_interleave(32, 0)[:80].repeat_interleave(32, 1)[:, :48]
    powers = (exponents.float() - 127).exp2().repeat_interleave(32, 1)[:, :48]
    expected = {"whole": 0.5, "one": 0.5, "rows": tensors["rows"][:, None], "columns": tensors["columns"]}
    expected |= {"blocks": grid, "exponents": powers, "powers": powers}
    for name, scale in expected.items():
        dense = Fp8Weight("w", slices["codes"], slices[name], [32, 32])
        assert torch.equal(dense[...], codes.float() * scale), name
        assert torch.equal(dense[33:79, slice(5, 40)], (codes.float() * scale)[33:79, 5:40]), name
        assert dense[80:80].shape == (0, 48)
    experts = Fp8Weight("w", slices["stack"], slices["experts"], None)
    assert torch.equal(experts[1:], (tensors["stack"].float() * tensors["experts"][:, None, None])[1:])
    fp4 = Fp8Weight("w", slices["packed"], slices["of_packed"], None)
    assert fp4.get_shape() == [4, 64]
    assert torch.equal(fp4[...][:, 3:50], fp4[:, 3:50])
    with pytest.raises(ValueError, match=r"scales of w have the shape \[3\].*\[80, 48\]"):
        Fp8Weight("w", slices["codes"], slices["experts"], None)


def test_mxfp4_parts(tmp_path: Path) -> None:
    blocks = torch.randint(256, (3, 20, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 20, 2), dtype=torch.uint8)
    save_file({"a_blocks": blocks, "a_scales": scales}, tmp_path / "a.safetensors")
    slices = slices_of([tmp_path / "a.safetensors"])
    dense = Mxfp4Weight("a_blocks", slices["a_blocks"], slices["a_scales"])
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(dense[...], expected)
    assert torch.equal(dense[1:2, 30:41, 3:9], expected[1:2, 30:41, 3:9])


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'.*Give the unquantized checkpoint"),
        ({"load_in_4bit": True}, "quantized by 'bitsandbytes'.*quantize='nf4'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized.*CompressedTensorsConfig"),
        ({"quant_method": "mxfp4"}, "mxfp4.*none of its tensors is"),
        ({"quant_method": "fp8"}, "lm_head.weight as fp8 codes without scales"),
        (None, "lm_head.weight_scale.*which nothing has read"),
    ],
)
def test_refused(tmp_path: Path, quantization: dict[str, Any] | None, message: str) -> None:
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    if quantization is None or quantization.get("quant_method") == "fp8":
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(E4M3)
        norm = "model.layers.0.self_attn.q_proj.weight"
        tensors[norm], tensors[norm + "_scale"] = tensors[norm].to(E4M3), torch.ones(1)
    if quantization is None:
        tensors["lm_head.weight_scale"] = torch.ones(1)
    folder = rewrite(tmp_path / "a", tmp_path / "b", quantization or {}, tensors)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_model_that_another_library_quantized() -> None:
    model = tiny_model()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"lm_head.weight is torch.uint8.*quantize='nf4'"):
        check_dense(model)


# --- a part of a checkpoint -------------------------------------------------------------------------------------------


def with_a_vision_tower(folder: Path) -> Path:
    text = tiny_config("qwen3_5_text").to_dict() | {"layer_types": ["full_attention", "full_attention"]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def test_weights_that_would_be_lost(tmp_path: Path) -> None:
    folder = with_a_vision_tower(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"model\.visual.*ConditionalGeneration keeps them\. ImageTextModule .*allow_unused_weights"
    ):
        AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, allow_unused_weights=True)
    export_pretrained(model, tmp_path / "b", source=folder)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3_5_text", ["Qwen3_5ForCausalLM"])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
