"""Export against `from_pretrained`: bit for bit, under any layout, and every other file as it came."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from automodel_trainer import AutoModelForCausalLM as Builder
from automodel_trainer import load_checkpoint, save_checkpoint, stream_weights
from automodel_trainer.callbacks.hf_export import HFExport
from automodel_trainer.callbacks.preemption import Preemption
from automodel_trainer.checkpoint import CheckpointError, export
from automodel_trainer.checkpoint.export import export_pretrained
from automodel_trainer.checkpoint.weights import load_weights
from tests.callbacks.runs import train
from tests.callbacks.test_preemption import Signal
from tests.harness import make_strategy
from tests.pool import RankPool
from tests.tiny import tiny_model, tiny_tokenizer


def assert_same(model: PreTrainedModel, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype == state[name].dtype, name
        assert torch.equal(value, state[name]), name


def tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_weights_that_are_shared_by_hand(tmp_path: Path) -> None:
    """The config does not say that they are tied, so readers would draw the second one anew."""
    model = tiny_model()
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    export_pretrained(model, tmp_path / "export")
    save_checkpoint(tmp_path / "checkpoint", {}, model, [])
    for folder in (tmp_path / "export", tmp_path / "checkpoint" / "model"):
        assert_same(AutoModelForCausalLM.from_pretrained(folder), model.state_dict())
    assert dict(stream_weights(model)).keys() == model.state_dict().keys()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    load_checkpoint(tmp_path / "checkpoint", model, [])
    assert_same(model, wanted)
    assert tied(model)


def test_shared_weights_that_were_saved_once(tmp_path: Path) -> None:
    """As version 0.1 saved them."""
    model = tiny_model()
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    save_checkpoint(tmp_path, {}, model, [])
    [file] = (tmp_path / "model").glob("*.safetensors")
    saved = load_file(file)
    save_file({name: tensor for name, tensor in saved.items() if name != "lm_head.weight"}, file, {"format": "pt"})
    for index in (tmp_path / "model").glob("*.index.json"):
        index.unlink()
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    load_weights(model, tmp_path / "model")
    assert_same(model, saved)


def names_on_disk(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            names |= set(stream.keys())
    return names


def hub_folder(folder: Path) -> Path:
    """A model as it comes from the Hub: more files than transformers writes, fields that it does not know."""
    model = tiny_model(tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    config |= {
        "torch_dtype": "bfloat16",
        "quirk_of_the_authors": {"a": [1, None]},
        "architectures": ["LlamaForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=[4, 2]).save_pretrained(folder)
    for name in ("README.md", "LICENSE", "modeling_extra.py", "assets/plot.svg", "params.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} as it came\n")
    for name in (
        "pytorch_model.bin",
        "original/consolidated.pth",
        ".cache/x",
        "model.gguf",
        "pytorch_model.bin.index.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"weights")
    return folder


def export_job(
    family: str, spec: str, world_size: int, source: Path | None, folder: Path, options: dict[str, Any], **config: Any
) -> None:
    strategy = make_strategy(spec, world_size)
    if source is not None:
        model = Builder.from_pretrained(source, strategy)
    else:
        model = strategy.parallelize(tiny_model(family, **config))
    export_pretrained(model, folder, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("spec", "world_size"), [("auto", 1), ("ddp", 2), ("fsdp2", 4), ("hsdp", 4)])
def test_loads_bit_for_bit_under_any_layout(pool: RankPool, tmp_path: Path, spec: str, world_size: int) -> None:
    options = {"max_shard_size": 40_000, "tokenizer": tiny_tokenizer()}
    pool.run(
        world_size, export_job, "llama", spec, world_size, None, tmp_path / "hf", options, tie_word_embeddings=True
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert_same(model, tiny_model(tie_word_embeddings=True).state_dict())
    assert tied(model)
    assert "lm_head.weight" not in names_on_disk(tmp_path / "hf")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 45_000 for file in files)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names_on_disk(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert tokenizer("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]


FAMILIES = ["llama", "qwen3_moe", "mixtral", "gpt2", "gemma3_text", "phi3", "deepseek_v3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_on_disk_are_those_that_transformers_writes(pool: RankPool, tmp_path: Path, family: str) -> None:
    """Mixtures of experts are one tensor in memory and one per expert on disk."""
    sizes: dict[str, Any] = {}
    if "moe" in family or family in ("mixtral", "deepseek_v3"):
        sizes = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
        sizes["moe_intermediate_size"] = 16
    if family == "deepseek_v3":
        sizes |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8}
        sizes |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
    model = tiny_model(family, **sizes)
    model.save_pretrained(tmp_path / "reference")
    pool.run(2, export_job, family, "fsdp2", 2, None, tmp_path / "hf", {"max_shard_size": 40_000}, **sizes)
    assert names_on_disk(tmp_path / "hf") == names_on_disk(tmp_path / "reference")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), model.state_dict())


def test_experts_are_converted_tensor_by_tensor() -> None:
    """Else rank 0 would hold the whole model at once."""
    model = tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    groups = export.conversion_groups(model, model.state_dict())
    assert max(map(len, groups)) == 1


def test_every_other_file_is_as_it_came(pool: RankPool, tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "source")
    pool.run(
        2, export_job, "", "fsdp2", 2, source, tmp_path / "hf", {"tokenizer": AutoTokenizer.from_pretrained(source)}
    )
    exported = {str(f.relative_to(tmp_path / "hf")) for f in (tmp_path / "hf").rglob("*") if f.is_file()}
    came = {str(f.relative_to(source)) for f in source.rglob("*") if f.is_file()}
    weights = {
        "pytorch_model.bin",
        "original/consolidated.pth",
        ".cache/x",
        "model.gguf",
        "pytorch_model.bin.index.json",
    }
    assert exported == came - weights
    for name in exported - {"model.safetensors", "config.json"}:
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes(), name
    # fp32 master weights of a bf16 checkpoint: the dtype is all that changed
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "hf"))
    assert after == {**before, "torch_dtype": "float32"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert tied(model)
    assert_same(model, {n: v.float() for n, v in AutoModelForCausalLM.from_pretrained(source).state_dict().items()})


def test_exported_in_the_dtype_it_came_in_nothing_changes(tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "source")
    model = Builder.from_pretrained(source, dtype=torch.float32)
    export_pretrained(model, tmp_path / "hf", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert_same(
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), AutoModelForCausalLM.from_pretrained(source).state_dict()
    )


def test_a_changed_config_is_written(tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "source")
    model = Builder.from_pretrained(source, attention_dropout=0.25)
    export_pretrained(model, tmp_path / "hf")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "hf"))
    assert after == {**before, "attention_dropout": 0.25}


def test_another_tokenizer_replaces_the_sources(tmp_path: Path) -> None:
    source = hub_folder(tmp_path / "source")
    assert (source / "chat_template.jinja").is_file()
    model = Builder.from_pretrained(source)
    export_pretrained(model, tmp_path / "a", tokenizer=tiny_tokenizer("{{ messages }}"))
    assert AutoTokenizer.from_pretrained(tmp_path / "a").chat_template == "{{ messages }}"
    export_pretrained(model, tmp_path / "b", tokenizer=tiny_tokenizer(None))
    assert AutoTokenizer.from_pretrained(tmp_path / "b").chat_template is None
    used = AutoTokenizer.from_pretrained(source)
    used(["a", "b c"], padding=True, truncation=True, max_length=4)  # leaves its traces in the tokenizer
    export_pretrained(model, tmp_path / "c", tokenizer=used)
    assert (tmp_path / "c" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_over_an_older_export_and_over_the_source_itself(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "model")
    model = Builder.from_pretrained(folder)
    export_pretrained(model, folder, max_shard_size=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    export_pretrained(model, folder)
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert not (folder / "model.safetensors.index.json").exists()
    assert (folder / "README.md").read_text() == "README.md as it came\n"
    assert_same(AutoModelForCausalLM.from_pretrained(folder), model.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def full_disk_job(folder: Path) -> str:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = make_strategy("fsdp2", 2).parallelize(tiny_model(seed=1))
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "0":
            patch.setattr(export, "save_file", fail)
        try:
            export_pretrained(model, folder, max_shard_size=40_000)  # type: ignore[arg-type]
        except CheckpointError as error:
            return str(error)
    return ""


def test_full_disk_fails_on_all_ranks_and_leaves_the_older_export(pool: RankPool, tmp_path: Path) -> None:
    export_pretrained(tiny_model(), tmp_path / "hf")
    first, second = pool.run(2, full_disk_job, tmp_path / "hf")
    assert first == second
    assert "No space left on device" in first
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), tiny_model().state_dict())


def test_callback_exports_at_the_end_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(tmp_path, [HFExport(dtype="bfloat16")], max_steps=2, max_epochs=None)
    assert capsys.readouterr().out.rstrip().endswith(f"amt generate --model {tmp_path / 'hf'}")
    weights = {name: value.bfloat16() for name, value in result["weights"].items()}
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), weights)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == tiny_tokenizer().chat_template


def test_callback_leaves_a_preempted_run_alone(tmp_path: Path) -> None:
    train(tmp_path, [Signal(2), Preemption(), HFExport()])
    assert not (tmp_path / "hf").exists()


def test_callback_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype='bf61'"):
        HFExport(dtype="bf61")
