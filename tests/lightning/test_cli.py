"""LightningCLI with our Trainer in its usual forms, the short form of `amt fit`, its help, and `amt convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from automodel_trainer import Trainer, cli
from automodel_trainer.cli_help import help_text
from automodel_trainer.lightning_cli import run
from automodel_trainer.short_options import ABOUT, SHORT, expand
from automodel_trainer.tools.convert import convert, main
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("classes", "options", "more"),
    [
        ((BoringModel, BoringDataModule), [], {}),
        ((BoringModel,), [], {}),
        ((), ["--model=BoringModel", "--data=BoringDataModule"], {}),
        ((BoringModel,), ["--model=BoringModel"], {"subclass_mode_model": True}),
    ],
    ids=["model and data", "model", "neither", "subclass mode"],
)
def test_lightnings_cli(tmp_path: Path, classes: Any, options: list[str], more: dict[str, Any]) -> None:
    common = {"max_steps": 2, "accelerator": "cpu", "devices": 1, "logger": "false", "enable_progress_bar": "false"}
    given = [f"--trainer.{name}={value}" for name, value in {**common, "default_root_dir": tmp_path}.items()]
    cli = LightningCLI(
        *classes, trainer_class=Trainer, save_config_callback=None, args=["fit", *given, *options], **more
    )
    assert cli.trainer.global_step == 2


def test_short_options_are_the_long_ones() -> None:
    assert expand(["--model", "org/name", "--data=chats.jsonl", "--lora", "8", "--trainer.max_steps", "3"]) == [
        "--model.model=org/name", "--data.train=chats.jsonl", "--model.lora.rank=8", "--trainer.max_steps", "3",
    ]  # fmt: skip
    for model in ("gpt2", "./models/Llama", "meta/Llama-3.2-1B", "/data/m.v2"):
        assert expand(["--model", model]) == [f"--model.model={model}"]
    for other in ("CausalLMModule", "my_package.MyModule", "model.yaml", '{"class_path": "x"}'):
        assert expand(["--model", other]) == [f"--model={other}"]
    assert SHORT.keys() == ABOUT.keys()


def test_amt_fit_in_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    chat = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(8)))
    short = "--model ./model --data chats.jsonl --lora 4 --lr 1e-3 --steps 2 --batch-size 2 --seq-len 64 --output run"
    quiet = ["--trainer.accelerator=cpu", "--devices=1", "--trainer.logger=false", "--trainer.enable_ledger=false"]
    cli = run(["fit", *short.split(), *quiet])
    assert cli.trainer.global_step == 2
    module: Any = cli.model
    assert (module.lora.rank, module.lr) == (4, 1e-3)
    adapter = json.loads(Path("run/checkpoints/latest/model/adapter_config.json").read_text())
    assert adapter["r"] == 4


def test_print_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--model=org/name", "--data=chats.jsonl", "--lora=4", "--lr=1e-3", "--strategy=fsdp2"]
    with pytest.raises(SystemExit) as ended:
        run(["fit", *short, "--print_config"])
    assert ended.value.code in (0, None)
    text = capsys.readouterr().out
    file = tmp_path / "config.yaml"
    file.write_text(text)
    config = yaml.safe_load(text)
    assert config["model"]["init_args"]["model"] == "org/name"
    assert config["model"]["init_args"]["lora"]["rank"] == 4
    assert config["data"]["init_args"]["train"] == "chats.jsonl"
    with pytest.raises(SystemExit):
        run(["fit", "--config", str(file), "--print_config"])
    assert capsys.readouterr().out == text


def test_help_lists_options_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["fit", "--help"])
    text = capsys.readouterr().out
    for command in cli.TRAINING:
        cli.main([command, "-h"])
        assert capsys.readouterr().out == help_text(command), "run python docs/help_texts.py"
    places = [text.index(f"--{name} ") for name in ("model", "model.lr", "model.lora.rank", "data.train")]
    assert places == sorted(places)
    assert text.index("--trainer.strategy ") < text.index("--trainer.fast_dev_run ")
    assert all(f"--{option}" in text for option in SHORT.values())


@pytest.fixture
def lightnings_file(tmp_path: Path) -> Path:
    state = {f"net.{name}": weight for name, weight in tiny_model().state_dict().items()}
    file = tmp_path / "epoch=1.ckpt"
    torch.save({"state_dict": state, "global_step": 4, "epoch": 1, "hyper_parameters": {"lr": 1.0}}, file)
    return file


def test_convert_makes_a_model_folder(lightnings_file: Path, tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path / "base")
    output = tmp_path / "model"
    arguments = [str(lightnings_file), "--output", str(output), "--prefix", "net.", "--config", str(tmp_path / "base")]
    main(arguments)
    model = AutoModelForCausalLM.from_pretrained(output)
    for name, weight in tiny_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    with pytest.raises(ValueError, match=r"exists already"):
        main(arguments)
    main([str(lightnings_file)])
    assert all(name.startswith("net.") for name in load_file(tmp_path / "epoch=1" / "model.safetensors"))
    with pytest.raises(ValueError, match=r"do not begin so"):
        convert(lightnings_file, tmp_path / "other", prefix="model.")


class Planted:
    def __reduce__(self) -> Any:
        return exec, ("import pathlib; pathlib.Path('planted').write_text('ran')",)


def test_convert_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "hyper_parameters": {"x": Planted()}}, file)
    with pytest.raises(ValueError, match=r"evil.ckpt cannot be converted: .*exec"):
        convert(file, tmp_path / "out")
    assert not list(tmp_path.rglob("planted"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"cannot be converted"):
        convert(tmp_path / "text.ckpt", tmp_path / "out")
