"""Every argument of transformers' `from_pretrained`, against transformers: the same model, or a ValueError by name."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig
from transformers import AutoModelForCausalLM as Theirs

from automodel_trainer import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LoRAConfig,
)
from automodel_trainer.auto import builder
from automodel_trainer.checkpoint.stream import stream_weights, weight_info
from automodel_trainer.models.sidecars import source_folder
from tests.tiny import tiny_config, tiny_model

IDS = torch.arange(6, 30).view(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("dropin") / "model"
    tiny_model("qwen3").save_pretrained(made)
    GenerationConfig(max_new_tokens=7, eos_token_id=3).save_pretrained(made)
    shutil.copytree(made, made.parent / "parts" / "text")
    return made


def seen(model: Any) -> list[Any]:
    """What a caller sees of a model."""
    config, generation = model.config, model.generation_config
    facts = [type(model), model.dtype, config._attn_implementation, config.num_hidden_layers, config.use_cache]
    facts += [generation.max_new_tokens, generation.eos_token_id, model.training, getattr(model, "hf_device_map", None)]
    return [*facts, config.name_or_path, model.name_or_path, config.dtype, {p.device for p in model.parameters()}]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out = model(input_ids=IDS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


INERT: dict[str, Any] = {
    "quantization_config": None, "revision": "main", "subfolder": "", "token": "x", "low_cpu_mem_usage": True,
    "cache_dir": "nowhere", "local_files_only": True, "force_download": False, "use_safetensors": True, "variant": None,
    "max_memory": None, "use_kernels": False, "key_mapping": None, "weights_only": True, "code_revision": None,
    "gguf_file": None, "trust_remote_code": True, "attn_implementation": None, "device_map": None,
}  # fmt: skip
HONOURED: list[dict[str, Any]] = [
    {}, INERT, {"dtype": torch.bfloat16}, {"dtype": "auto", "trust_remote_code": None}, {"torch_dtype": "bfloat16"},
    {"device_map": "cpu", "torch_dtype": "auto"}, {"device_map": {"": "cpu"}, "attn_implementation": "eager"},
    {"use_cache": False, "num_hidden_layers": 1, "device_map": torch.device("cpu"), "output_hidden_states": True},
    {"generation_config": GenerationConfig(max_new_tokens=3), "experts_implementation": "eager"},
    {"ignore_mismatched_sizes": True}, {"device_map": "auto", "max_memory": {"cpu": "1GB"}},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_arguments_are_honoured(folder: Path) -> None:
    for given in HONOURED:
        ours, theirs = (auto.from_pretrained(folder, **copy.deepcopy(given)) for auto in (AutoModelForCausalLM, Theirs))
        assert seen(ours) == seen(theirs), given
        assert torch.equal(logits(ours), logits(theirs)), given
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    inner = AutoModelForCausalLM.from_pretrained(folder.parent / "parts", subfolder="text")
    assert torch.equal(logits(inner), logits(model))


def test_no_random_number_is_drawn(folder: Path) -> None:
    """What a script draws after the model is what it draws after transformers' own."""
    drawn = []
    for auto in (AutoModelForCausalLM, Theirs):
        torch.manual_seed(0)
        auto.from_pretrained(folder)
        drawn.append(torch.rand(()))
    assert drawn[0] == drawn[1]


def test_arguments_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    from_pretrained = AutoModelForCausalLM.from_pretrained
    lora = LoRAConfig(rank=2)
    quantized = BitsAndBytesConfig(load_in_4bit=True)
    for told, given in {
        "nonsense_arg": {"nonsense_arg": 1},
        "pickle|pickled": {"use_safetensors": False},
        "HTTPS_PROXY": {"proxies": {"a": "b"}},
        "from_tf": {"from_tf": True},
        "no device": {"device_map": "gpu"},
        "quantize='nf4'": {"quantization_config": quantized, "lora": lora},
        "key_mapping=": {"key_mapping": {"a": "b"}, "lora": lora},
        "device_map= .* lora=": {"device_map": "auto", "lora": lora},
        "no subfolder": {"subfolder": "absent"},
        "not a torch dtype": {"dtype": "float33"},
    }.items():
        with pytest.raises(ValueError, match=told):
            from_pretrained(folder, **given)
    with torch.device("meta"), pytest.raises(ValueError, match="from_config builds an empty model"):
        from_pretrained(folder)
    with pytest.raises(ValueError, match="no argument"):
        AutoModelForCausalLM.from_config(tiny_config(), nonsense=1)
    shutil.copytree(folder, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin, which are not read \(pickle can run code\). Convert"):
        from_pretrained(tmp_path / "bin")


def test_configs_are_copied_and_drawn_as_asked(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    before = config.to_dict()
    assert (
        AutoModelForCausalLM.from_pretrained(folder, config=config, num_hidden_layers=1).config.num_hidden_layers == 1
    )
    assert AutoModelForCausalLM.from_pretrained(folder, config=str(folder)).config.num_hidden_layers == 2
    assert config.to_dict() == before
    assert AutoModelForCausalLM.from_config(config, torch_dtype="bfloat16").dtype == torch.bfloat16
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn += [logits(AutoModelForCausalLM.from_config(config).eval()) for _ in range(2)]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    for context in (torch.device("meta"), init_empty_weights()):
        with context:
            assert all(p.is_meta for p in AutoModelForCausalLM.from_config(config).parameters())


def test_adapter_folders_load_the_base_too(folder: Path, tmp_path: Path) -> None:
    base = Theirs.from_pretrained(folder)
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    peft.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(".lora_" in name for name, _ in model.named_parameters()) == 2 * 2 * model.config.num_hidden_layers
    assert torch.allclose(logits(model), logits(peft.eval()), atol=1e-6)
    assert not torch.allclose(logits(model), logits(Theirs.from_pretrained(folder)), atol=1e-3)
    assert model.config.name_or_path == str(folder)
    assert isinstance(peft, PeftModel)


def test_heads_of_other_classes(folder: Path, tmp_path: Path) -> None:
    """A head that the checkpoint lacks is new, with a word; a part of the body that it lacks is refused."""
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        with pytest.warns(UserWarning, match="holds no score of Qwen3For"):
            model = auto.from_pretrained(folder, num_labels=5)
        assert model.score.weight.shape == (5, model.config.hidden_size)
        model.config.pad_token_id = 0
        model.save_pretrained(tmp_path / auto.__name__)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = auto.from_pretrained(tmp_path / auto.__name__)
        theirs = getattr(transformers, auto.__name__).from_pretrained(tmp_path / auto.__name__)
        assert torch.equal(logits(again), logits(theirs))
        with pytest.raises(ValueError, match=r"lacks weights of .*model.layers.2"):
            auto.from_pretrained(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    body = AutoModel.from_pretrained(folder)
    assert torch.equal(logits(body), logits(transformers.AutoModel.from_pretrained(folder)))
    bert = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=100
    )
    transformers.AutoModelForMaskedLM.from_config(bert).save_pretrained(tmp_path / "bert")
    with pytest.warns(UserWarning, match=r"holds no bert.pooler, classifier of BertForSequenceClassification"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    masked = builder("AutoModelForMaskedLM").from_pretrained(tmp_path / "bert")
    assert torch.equal(logits(masked), logits(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert")))
    with pytest.raises(ValueError, match="AutoModelForImageTextToText"):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_hub_names_are_kept(folder: Path, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text(commit)
    for given in ({"cache_dir": tmp_path}, {"cache_dir": str(tmp_path), "local_files_only": True, "revision": commit}):
        model = AutoModelForCausalLM.from_pretrained("org/tiny", **given)
        assert model.config.name_or_path == model.name_or_path == "org/tiny"
        assert source_folder(model) == source_folder(copy.deepcopy(model)) == Path(os.path.realpath(snapshot))
    with pytest.raises(ValueError, match="neither a folder here nor a Hub repository"):
        AutoModelForCausalLM.from_pretrained("org/absent", local_files_only=True)


def test_calls_of_other_libraries(folder: Path) -> None:
    """The calls as these libraries write them."""
    bf16, config = torch.bfloat16, AutoConfig.from_pretrained(folder)
    path = str(folder)
    calls: dict[str, tuple[type, dict[str, Any]]] = {
        "OpenRLHF, actor": (
            AutoModelForCausalLM,
            {
                "trust_remote_code": True,
                "attn_implementation": "sdpa",
                "quantization_config": None,
                "torch_dtype": bf16,
                "device_map": None,
            },
        ),
        "veRL, FSDP worker": (AutoModelForCausalLM, {"torch_dtype": bf16, "config": config, "trust_remote_code": True}),
        "veRL, critic": (
            AutoModelForTokenClassification,
            {"torch_dtype": bf16, "config": config, "attn_implementation": "sdpa", "trust_remote_code": False},
        ),
        "NeMo-RL, DTensor worker": (
            AutoModelForCausalLM,
            {"device_map": "cpu", "trust_remote_code": True, "config": config},
        ),
        "lm-eval, HFLM": (
            AutoModelForCausalLM,
            {
                "revision": "main",
                "torch_dtype": "auto",
                "trust_remote_code": False,
                "gguf_file": None,
                "quantization_config": None,
                "subfolder": "",
                "device_map": {"": "cpu"},
            },
        ),
        "sentence-transformers": (
            AutoModel,
            {
                "config": config,
                "cache_dir": None,
                "token": None,
                "trust_remote_code": False,
                "revision": None,
                "local_files_only": True,
            },
        ),
        "TRL, reward model": (
            AutoModelForSequenceClassification,
            {"num_labels": 1, "dtype": "float32", "device_map": None},
        ),
        "TRL, SFT": (
            AutoModelForCausalLM,
            {
                "dtype": torch.float32,
                "device_map": None,
                "revision": "main",
                "attn_implementation": None,
                "quantization_config": None,
            },
        ),
    }
    for name, (auto, given) in calls.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = auto.from_pretrained(pretrained_model_name_or_path=path, **copy.deepcopy(given))
            theirs = getattr(transformers, auto.__name__).from_pretrained(path, **copy.deepcopy(given))
        assert (type(ours), ours.dtype, ours.training) == (type(theirs), theirs.dtype, theirs.training), name
        assert ours.state_dict().keys() == theirs.state_dict().keys(), name
    trl = pytest.importorskip("trl.trainer.utils")
    assert trl.create_model_from_path(path, architecture=AutoModelForCausalLM).dtype == torch.float32
    model = AutoModelForCausalLM.from_pretrained(path)
    model.gradient_checkpointing_enable()
    reference = copy.deepcopy(model)
    model.push_to_hub, reference.push_to_hub  # noqa: B018  are there
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=3), reference.generate(IDS[:1], max_new_tokens=3))


def test_a_model_of_images_and_text(tmp_path: Path) -> None:
    """It loads as in transformers, and what is streamed is what transformers saves."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision, "image_size": 16, "patch_size": 8},
        text_config=tiny_config("llama").to_dict(),
        image_token_id=5,
    )
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([[7, 5, 5, 5, 5, 8]]), "pixel_values": torch.ones(1, 3, 16, 16)}
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    saved, streamed = load_file(tmp_path / "model.safetensors"), dict(stream_weights(ours))
    assert streamed.keys() == saved.keys() == weight_info(ours).keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in saved.items())
