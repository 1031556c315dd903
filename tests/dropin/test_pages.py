"""docs/own_loop.md and the loop of the README: on one process, on two ranks, and the tests that the page names."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from automodel_trainer import AutoModelForCausalLM
from automodel_trainer.auto import builder
from tests.limits import check_run
from tests.pool import RankPool
from tests.processes import call, run_code
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_loop.md").read_text()
LOOP = next(
    b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) if "start()" in b
)


def run(code: str, folder: Path) -> None:
    os.chdir(folder)
    exec(code, {})


def one_device(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the README's loop does, in plain torch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "my-model", dtype=dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    torch.manual_seed(0)
    for rows in torch.randint(6, 200, (2, 4, 16)):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_readmes_loop_on_two_ranks(pool: RankPool, tmp_path: Path) -> None:
    """With a larger eps: Adam's own divides the rounding of small gradients by almost nothing."""
    tiny_model().save_pretrained(tmp_path / "my-model")
    assert "lr=1e-3)" in LOOP
    pool.run(2, run, LOOP.replace("lr=1e-3)", "lr=1e-3, eps=1e-3)"), tmp_path)
    saved = load_file(tmp_path / "my-own-model" / "model.safetensors")
    check_run(saved, one_device(tmp_path, torch.float64), one_device(tmp_path, torch.float32), 64)


def test_the_page(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "my-model")
    call(tmp_path, run_code, "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), tmp_path / "page.py")
    assert (tmp_path / "my-own-model" / "model.safetensors").is_file()
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in tests, name


def refit(arguments: list[str]) -> tuple[float, float]:
    spec = importlib.util.spec_from_file_location("refit", ROOT / "docs" / "refit.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    seen: tuple[float, float] = example.main(arguments)
    return seen


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("llama", ["--strategy", "fsdp2"]),
        ("llama", ["--strategy", "fsdp2:tp=2", "--lora", "4"]),
        ("qwen3_moe", ["--strategy", "fsdp2:ep=2"]),
    ],
)
def test_an_engine_is_refitted(pool: RankPool, tmp_path: Path, kind: str, arguments: list[str]) -> None:
    """A receiver that loads by name computes what the trained model computes, and not what it did before."""
    tiny_model(kind).save_pretrained(tmp_path / "my-model")
    moved, apart = pool.run(2, refit, [str(tmp_path / "my-model"), *arguments])[0]
    assert moved > 0.1
    assert apart < 1e-4


def guide(folder: Path, strategy: str | None, theirs: bool = False) -> dict[str, Any]:
    """What the guide does: load in bfloat16, tokenize, generate in inference mode, decode."""
    auto: Any = transformers.AutoModelForCausalLM if theirs else AutoModelForCausalLM
    options = {} if strategy is None else {"strategy": strategy}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = auto.from_pretrained(folder, dtype=torch.bfloat16, **options)
    inputs = tokenizer("a haiku about the kernels", return_tensors="pt").to(model.device)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
        logits = model(**inputs).logits
    model(**inputs, labels=inputs["input_ids"]).loss.backward()  # and training goes on
    gradient: Any = model.lm_head.weight.grad
    return {
        "gradient": gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient,
        "dtype": model.dtype,
        "text": tokenizer.decode(out[0], skip_special_tokens=True),
        "texts": tokenizer.batch_decode(out, skip_special_tokens=True),
        "logits": logits.full_tensor() if hasattr(logits, "full_tensor") else logits.clone(),
    }


def test_the_guides_examples(pool: RankPool, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    theirs = guide(tmp_path / "model", None, theirs=True)
    (alone,) = pool.run(1, guide, tmp_path / "model", None)
    for ours in (alone, *pool.run(2, guide, tmp_path / "model", "fsdp2")):
        assert ours["dtype"] == torch.bfloat16
        assert (ours["text"], ours["texts"]) == (theirs["text"], theirs["texts"])
        assert torch.equal(ours["logits"], theirs["logits"])
        assert torch.allclose(ours["gradient"], theirs["gradient"], rtol=2e-2, atol=1e-3)  # bf16 has 8 bits


@pytest.mark.parametrize("name", ["AutoModelForTextToWaveform", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM"])
def test_any_other_auto_class(name: str, tmp_path: Path) -> None:
    small = {
        "AutoModelForTextToWaveform": transformers.VitsConfig(
            vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, flow_size=32,
            spectrogram_bins=17, upsample_initial_channel=32, prior_encoder_num_flows=1, wavenet_dilation_rate=1,
            prior_encoder_num_wavenet_layers=1, posterior_encoder_num_wavenet_layers=1, depth_separable_num_layers=1,
            duration_predictor_num_flows=1,
        ),
        "AutoModelForSeq2SeqLM": transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        ),
        "AutoModelForMaskedLM": transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ),
    }[name]  # fmt: skip
    torch.manual_seed(0)
    auto: Any = getattr(transformers, name)
    auto.from_config(small).save_pretrained(tmp_path)
    theirs, ours = auto.from_pretrained(tmp_path), builder(name).from_pretrained(tmp_path)
    assert type(ours).__name__ == type(theirs).__name__
    assert not ours.training
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in theirs.state_dict().items())
    ours.save_pretrained(tmp_path / "saved")
    assert (
        load_file(tmp_path / "saved" / "model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()
    )
