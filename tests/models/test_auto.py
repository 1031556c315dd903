"""The builder against transformers' own."""

from __future__ import annotations

import ctypes
import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from automodel_trainer import AutoModelForCausalLM, CausalLMModule, MockDataModule, Trainer
from automodel_trainer.distributed._dtensor import local_tensor
from tests.harness import close, make_strategy
from tests.pool import RankPool
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt2", "mixtral", "qwen3_moe"]


def save(family: str, folder: Path, **overrides: Any) -> torch.Tensor:
    model = tiny_model(family, **overrides)
    model.save_pretrained(folder)
    return logits(model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(6, 30).view(2, 12)
    return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_same_as_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    save(family, tmp_path, tie_word_embeddings=tied)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied
    assert torch.equal(logits(ours), logits(theirs))


def test_bare_training_loop_and_generate(tmp_path: Path) -> None:
    save("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    ids = torch.arange(6, 30).view(2, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert model.eval().generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_dtype(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path, make_strategy("auto", 1, "bf16")).dtype == torch.float32
    with pytest.raises(ValueError, match="not a torch dtype"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float33")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    save("llama", tmp_path, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"lacks weights of LlamaForCausalLM: model.layers.2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=3, allow_missing_weights=True)
    assert model.model.layers[2].mlp.up_proj.weight.std() > 0.01


def test_surplus_weights_are_told(tmp_path: Path) -> None:
    save("llama", tmp_path, num_hidden_layers=2)
    with pytest.warns(UserWarning, match=r"does not have: model.layers.1"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"dtype": "float12"}, "config of .* cannot be read: .*float12"),
        ("config.json", {"intermediate_size": 24}, r"do not fit the model of its config: .* and should be \[24, "),
        ("config.json", {"tie_word_embeddings": True}, r"ties lm_head.weight .*config_overrides=.*False"),
        ("generation_config.json", None, "generation_config.json' is not a valid JSON file"),
        ("adapter_config.json", {"peft_type": "LORA"}, r"no config.json.*It is an adapter: .*lora=\{'adapter': "),
    ],
)
def test_damaged_folders(tmp_path: Path, file: str, changes: dict[str, Any] | None, message: str) -> None:
    """Each is refused in words before anything is trained."""
    save("llama", tmp_path)
    path = tmp_path / file
    if changes is None:
        path.write_text("{")
    else:
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes}))
    if file == "adapter_config.json":
        (tmp_path / "config.json").unlink()
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path / "run")
    module = CausalLMModule(str(tmp_path), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, MockDataModule(seq_len=16, num_samples=2))


def test_unknown_override(tmp_path: Path) -> None:
    save("llama", tmp_path)
    with pytest.raises(ValueError, match="hidden_dimension"):
        AutoModelForCausalLM.from_pretrained(tmp_path, hidden_dimension=3)


LAYOUTS = (("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("ddp", 2))


def build_sharded(spec: str, world_size: int, folder: str | None, family: str, tied: bool) -> Any:
    torch.manual_seed(world_size)
    strategy = make_strategy(spec, world_size)
    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, strategy)
    else:
        model = AutoModelForCausalLM.from_config(random_config(family, tied), strategy, seed=7)
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    return sharded, model.get_output_embeddings().weight is model.get_input_embeddings().weight, logits(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_into_shards(pool: RankPool, family: str, tmp_path: Path) -> None:
    expected = save(family, tmp_path, tie_word_embeddings=True)
    for sharded, tied, result in pool.run(2, build_sharded, "fsdp2", 2, str(tmp_path), family, True):
        assert sharded
        assert tied
        assert torch.allclose(result, expected, atol=1e-6)


def random_config(family: str, tied: bool) -> PreTrainedConfig:
    return tiny_config(family, tie_word_embeddings=tied, initializer_range=0.5)


@pytest.mark.parametrize(
    ("spec", "world_size", "family", "tied"),
    [
        *((spec, n, "llama", tied) for spec, n in LAYOUTS for tied in (True, False)),
        ("fsdp2", 2, "phi", True),  # its tied head has a bias of its own
    ],
)
def test_random_weights_do_not_depend_on_the_layout(
    pool: RankPool, spec: str, world_size: int, family: str, tied: bool
) -> None:
    expected, other = (logits(AutoModelForCausalLM.from_config(random_config(family, tied), seed=n)) for n in (7, 8))
    assert not torch.allclose(expected, other, atol=1e-2)
    for _, is_tied, result in pool.run(world_size, build_sharded, spec, world_size, None, family, tied):
        assert is_tied == tied
        close(result, expected, terms=64 * 14)  # some 14 products in a row


def peak_memory_of_load(folder: str) -> float:
    """Peak growth of this rank's resident memory, mapped file pages included, until its weights are in use; in MiB."""
    strategy = make_strategy("fsdp2", 4)
    process, peak, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.002)

    with suppress(AttributeError):  # glibc's: memory that jobs before have freed would hide what this one takes
        ctypes.CDLL(None).malloc_trim(0)
    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = AutoModelForCausalLM.from_pretrained(folder, strategy)
    with torch.no_grad():
        for parameter in model.parameters():
            local_tensor(parameter).mul_(1.0)
    done.set()
    watcher.join()
    return (peak[0] - before) / 2**20


def test_no_rank_holds_the_whole_model(pool: RankPool, tmp_path: Path) -> None:
    """A model of SmolLM2-135M's shape (513 MiB in fp32) over 4 ranks: 128 MiB each, and little more at the peak."""
    shape = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    }
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(**shape), dtype=torch.float32)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.tie_weights()
    whole = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    model.save_pretrained(tmp_path)
    del model
    tiny_model().save_pretrained(tmp_path / "small")
    pool.run(4, peak_memory_of_load, str(tmp_path / "small"))  # what a rank's first load takes once, for its process
    peaks = pool.run(4, peak_memory_of_load, str(tmp_path))
    print(f"model {whole:.0f} MiB; peak resident memory per rank: {[f'{peak:.0f} MiB' for peak in peaks]}")
    assert 0.2 * whole < max(peaks) < 0.6 * whole
