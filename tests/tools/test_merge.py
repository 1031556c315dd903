"""`amt merge`: base + adapter as one model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from automodel_trainer import AutoModelForCausalLM
from automodel_trainer.checkpoint.safetensors_stream import SafetensorsWriter
from automodel_trainer.models.lora import LoRAConfig, adapters
from automodel_trainer.models.lora.adapter_files import save_adapter
from automodel_trainer.tools.merge import main, merge
from tests.harness import close
from tests.processes import call, run_code
from tests.tiny import tiny_model, tiny_tokenizer

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
IDS = torch.arange(6, 70).view(2, 32)


def trained(
    folder: Path, family: str = "llama", config: Any = (), dtype: Any = torch.float32, **lora: Any
) -> PreTrainedModel:
    """A base in several files under `folder`/base, and an adapter of it that does something."""
    tiny_model(family, **dict(config)).to(dtype).save_pretrained(folder / "base", max_shard_size="25KB")
    tiny_tokenizer().save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", lora=LoRAConfig(rank=4, **lora)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, folder / "adapter")
    return model


CASES = {
    "plain": ("llama", {}, {}),
    "dora with biases": ("qwen2", {}, {"use_dora": True}),
    "rslora": ("llama", {}, {"use_rslora": True, "alpha": 3.0}),
    "pissa": ("llama", {}, {"init": "pissa"}),
    "head": ("llama", {}, {"modules_to_save": ["lm_head", "norm"]}),
    "tied": ("llama", {"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]}),
    "experts in parts": ("qwen3_moe", MOE, {}),
    "dense and experts": ("qwen3_moe", {**MOE, "mlp_only_layers": [0]}, {}),
    "router": ("qwen3_moe", MOE, {"target_modules": ["gate.weight", "experts.gate_up_proj"]}),
    "renamed": ("mixtral", {"num_local_experts": 4}, {}),
    "transposed experts": ("gpt_oss", {"num_local_experts": 4}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_logits_are_those_of_base_and_adapter(case: str, tmp_path: Path) -> None:
    family, config, lora = CASES[case]
    model = trained(tmp_path, family, config, **lora)
    merged = merge(tmp_path / "adapter", tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
    close(loaded(IDS).logits, model(IDS).logits)
    base, out = tmp_path / "base", tmp_path / "merged"
    assert {f.name for f in out.iterdir()} == {f.name for f in base.iterdir()}
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((base / index).read_text())
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_bf16_is_one_rounding_away(tmp_path: Path) -> None:
    model = trained(tmp_path, dtype=torch.bfloat16)
    merge(tmp_path / "adapter", tmp_path / "merged")
    weights = {name: w for file in (tmp_path / "merged").glob("*.safetensors") for name, w in load_file(file).items()}
    for adapter in adapters(model):
        weight = adapter.module.weight.float()  # type: ignore[operator]
        exact = weight + adapter.scaling * adapter.b.weight @ adapter.a.weight
        merged = weights[f"{adapter.target}.weight"]
        assert merged.dtype == torch.bfloat16
        torch.testing.assert_close(merged.float(), exact, atol=0, rtol=2**-8)
        assert (merged != weight.bfloat16()).any()


def test_dtype(tmp_path: Path) -> None:
    trained(tmp_path)
    merge(tmp_path / "adapter", tmp_path / "half", dtype=torch.bfloat16)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.bfloat16
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 2 for p in loaded.parameters())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="neither a folder here nor"):
        main([str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")])
    main([str(tmp_path / "adapter"), "--output", str(tmp_path / "merged"), "--base", str(tmp_path / "moved")])
    assert f"amt generate --model {tmp_path / 'merged'}" in capsys.readouterr().out


def test_the_adapter_s_tokenizer_goes_along(tmp_path: Path) -> None:
    trained(tmp_path)
    tiny_tokenizer(chat_template="{{ messages }}").save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages }}"


def test_bad_input(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        merge(tmp_path / "adapter", tmp_path / "there")
    tiny_model(hidden_size=64, head_dim=16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another base model"):
        merge(tmp_path / "adapter", tmp_path / "merged", tmp_path / "other")
    config = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base model"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    config.unlink()
    with pytest.raises(ValueError, match=r"no adapter_config.json"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_file_that_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    trained(tmp_path)
    for file in (tmp_path / "base").glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t for n, t in tensors.items() if "layers.1.mlp.up_proj" not in n}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no model.layers.1.mlp.up_proj.weight"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


_MEASURE = """
import resource, sys, torch
from automodel_trainer.tools.merge import merge
sizes = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")]
import threading, time
peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], *(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")))
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
merge(sys.argv[1], sys.argv[2])
print((peak[0] - sizes[0]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    """A base of about 200 MB in one file; the largest tensor is 8 MB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "head_dim": 64}
    model = tiny_model(**sizes, num_attention_heads=16, num_key_value_heads=16)
    total = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    model.save_pretrained(tmp_path / "base", max_shard_size="5GB")
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "base", lora=LoRAConfig(rank=4))
    save_adapter(adapted, tmp_path / "adapter")
    places = str(tmp_path / "adapter"), str(tmp_path / "merged")
    printed = call(tmp_path, run_code, _MEASURE, tmp_path / "measure.py", *places)
    assert total > 200
    assert int(printed.split()[-1]) < 0.5 * total


def test_writer_writes_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.arange(7),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(2.0),
    }
    planned = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "x.safetensors", planned) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.T.contiguous().T if tensor.ndim == 2 else tensor)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
