"""Every YAML in configs/ runs, as it is but for a tiny model, a little data and two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.beside import folder_of, use
from tests.processes import amt
from tests.tiny import save_tiny_model, write_chats
from tests.vlm.families import model_of, processor_of
from tests.vlm.families import rows as pictures

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    save_tiny_model(folder / "model")
    write_chats(folder / "chats.jsonl", 200)
    model_of("llava").save_pretrained(folder / "vlm")
    processor_of("llava").save_pretrained(folder / "vlm")
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
    if config.stem.startswith("vlm"):
        options |= {"model.model": str(home / "vlm"), "data.train": str(home / "pictures.jsonl")}
        options["data.num_workers"] = "1"
    options |= {"data.seq_len": "256", "data.global_batch_size": "4", "data.micro_batch_size": "2"}
    if "validation" in data:
        options["data.validation"] = (
            options["data.train"] if config.stem.startswith("vlm") else str(home / "chats.jsonl")
        )
    scheduler = content["model"].get("scheduler")
    if isinstance(scheduler, dict) and "warmup_steps" in scheduler:
        options["model.scheduler.warmup_steps"] = "1"
    return [part for key, value in options.items() for part in (f"--{key}", value)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_runs(config: Path, home: Path) -> None:
    beside = []
    if "torchao" in config.read_text():
        use("torchao")
        beside = [folder_of("torchao")]
    amt("fit", "--config", config, *overrides(config, home), folder=home, path=beside)
    saved = home / config.stem / "config.yaml"
    assert (home / config.stem / "checkpoints" / "latest" / "config.yaml").is_file()
    assert yaml.safe_load(saved.read_text())["trainer"]["max_steps"] == 2


def test_a_saved_config_runs_again(home: Path) -> None:
    config = next(path for path in CONFIGS if path.stem == "sft")
    options = overrides(config, home)
    root = home / "again"
    options[options.index("--trainer.default_root_dir") + 1] = str(root)
    amt("fit", "--config", config, *options, folder=home)
    amt("fit", "--config", root / "checkpoints" / "latest" / "config.yaml", folder=home)
    assert (root / "checkpoints-v1" / "latest").is_dir()
