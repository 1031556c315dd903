"""Every YAML in configs/ runs, as it is but for a tiny model, a little data and two steps."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.beside import folder_of, use
from tests.processes import amt, call, run_amt
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer, write_chats
from tests.vlm.families import model_of, processor_of
from tests.vlm.families import rows as pictures

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MODELS = [config for config in CONFIGS if config.parent.name == "models"]
# The families of well-known models, for tiny ones in their place; those that see pictures are in tests/vlm/families.py.
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama-3.1-8b": ("llama", {}),
    "qwen3-8b": ("qwen3", {}),
    "gpt-oss-20b": ("gpt_oss", {"num_local_experts": 4, "sliding_window": 16}),
    "qwen3-30b-a3b": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
}
SEE = {"gemma-3-4b": "gemma3", "qwen3-vl-8b": "llava"}  # the processor of its own family needs torchvision


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    save_tiny_model(folder / "model")
    write_chats(folder / "chats.jsonl", 200)
    model_of("llava").save_pretrained(folder / "vlm")
    processor_of("llava").save_pretrained(folder / "vlm")
    for name, (family, sizes) in FAMILIES.items():
        tiny_model(family, **sizes).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    for name, family in SEE.items():
        model_of(family).save_pretrained(folder / name)
        processor_of(family).save_pretrained(folder / name)
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pictures(folder, 60)))
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": "two and two are four. " * 20}) + "\n" for _ in range(200))
    )
    return folder


def overrides(config: Path, home: Path) -> list[str]:
    content = yaml.safe_load(config.read_text())
    options = {
        "trainer.accelerator": "cpu",
        "trainer.devices": "1",
        "trainer.precision": "fp32",
        "trainer.max_steps": "2",
        "trainer.default_root_dir": str(home / config.stem),
        "model.model": str(home / "model"),
    }
    data = content["data"]
    text = "TextDataModule" in str(data.get("class_path"))
    options["data.train"] = str(home / ("text.jsonl" if text else "chats.jsonl"))
    if config.stem in FAMILIES or config.stem in SEE:
        options["model.model"] = str(home / config.stem)
    if config.stem.startswith("vlm") or config.stem in SEE:
        options["data.train"] = str(home / "pictures.jsonl")
        options["data.num_workers"] = "1"
    if config.stem.startswith("vlm"):
        options["model.model"] = str(home / "vlm")
    options |= {"data.seq_len": "256", "data.global_batch_size": "4", "data.micro_batch_size": "2"}
    if "validation" in data:
        options["data.validation"] = (
            options["data.train"] if config.stem.startswith("vlm") else str(home / "chats.jsonl")
        )
    scheduler = content["model"].get("scheduler")
    if isinstance(scheduler, dict) and "warmup_steps" in scheduler:
        options["model.scheduler.warmup_steps"] = "1"
    return [part for key, value in options.items() for part in (f"--{key}", value)]


def amt_with_torchao(arguments: list[str], stance: str = "force_eager") -> None:
    torch.compiler.set_stance(stance)  # its optimizers compile their step, for half a minute
    run_amt(arguments, [str(folder_of("torchao"))])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_runs(config: Path, home: Path) -> None:
    run = "fit", "--config", config, *overrides(config, home)
    if "torchao" in config.read_text():
        use("torchao")
        call(home, amt_with_torchao, [str(part) for part in run])
    else:
        amt(*run, folder=home)
    saved = home / config.stem / "config.yaml"
    assert (home / config.stem / "checkpoints" / "latest" / "config.yaml").is_file()
    assert yaml.safe_load(saved.read_text())["trainer"]["max_steps"] == 2


@pytest.mark.matrix
def test_a_low_bit_optimizer_compiles_its_step(home: Path) -> None:
    use("torchao")
    config = next(path for path in CONFIGS if path.stem == "qlora")
    arguments = "fit", "--config", str(config), *overrides(config, home)
    call(home, amt_with_torchao, [*arguments, "--trainer.default_root_dir", str(home / "compiled")], "default")


def test_well_known_models_say_what_they_need() -> None:
    """The head of each has the figures of the page that chooses; what is measured stands in the results."""
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    import choose

    assert {config.stem for config in MODELS} == {*FAMILIES, *SEE}
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    for config in MODELS:
        text = config.read_text()
        name = yaml.safe_load(text)["model"]["model"]
        lines = choose.memory_lines(name if name in choose.MODELS else name.removesuffix("-Instruct"))
        assert "\n".join(lines) + "\n" in text, config.name
        measured = re.findall(r"^# Measured.* ([\d.]+) GiB", text, re.MULTILINE)
        assert all(figure in results for figure in measured)


def test_a_saved_config_runs_again(home: Path) -> None:
    config = next(path for path in CONFIGS if path.stem == "sft")
    options = overrides(config, home)
    root = home / "again"
    options[options.index("--trainer.default_root_dir") + 1] = str(root)
    amt("fit", "--config", config, *options, folder=home)
    amt("fit", "--config", root / "checkpoints" / "latest" / "config.yaml", folder=home)
    assert (root / "checkpoints-v1" / "latest").is_dir()
