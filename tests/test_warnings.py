"""What a run prints is for its user: no warning of a dependency's that this project could have avoided."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

import automodel_trainer
from automodel_trainer import CausalLMModule, ChatDataModule, LoRAConfig, Trainer
from automodel_trainer.callbacks import HFExport
from tests.processes import Job
from tests.tiny import tiny_model, tiny_tokenizer

GONE = ("LeafSpec", "was called before the ``update``", "is_gradient_checkpointing")
OWN = tuple(
    str((Path(automodel_trainer.__file__).parent / part).resolve()) + os.sep for part in ("", "strategies", "callbacks")
)
AVOIDABLE = (FutureWarning, DeprecationWarning, PendingDeprecationWarning, UserWarning)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warnings")
    tiny_model(num_hidden_layers=4).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    chat = [{"role": "user", "content": "what is two plus two?"}, {"role": "assistant", "content": "it is four"}]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(60)))
    return folder


def fit_and_validate(home: Path, strategy: str, devices: int, lora: bool) -> None:
    """What the README begins with, and an evaluation; every warning is printed as a line of JSON."""
    warnings.resetwarnings()
    warnings.simplefilter("always")
    warnings.showwarning = shown
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        max_steps=2,
        default_root_dir=home / f"run-{strategy.partition(':')[0]}",
        callbacks=[HFExport()],
    )
    adapters: dict[str, Any] = {"lora": LoRAConfig(rank=4)} if lora else {}
    module = CausalLMModule(str(home / "model"), lr=1e-3, **adapters)
    sizes = {"seq_len": 128, "micro_batch_size": 2, "global_batch_size": 8}
    data = ChatDataModule(str(home / "chats.jsonl"), val_split=0.2, **sizes)
    trainer.fit(module, data)
    trainer.validate(module, data)


def shown(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    kind = next((kind.__name__ for kind in AVOIDABLE if issubclass(category, kind)), "")
    said = {"kind": kind, "place": f"{os.path.realpath(filename)}:{lineno}", "says": str(message)}
    print("WARNING " + json.dumps(said), flush=True)


@pytest.mark.parametrize(
    ("strategy", "devices", "lora"), [("auto", 1, False), ("fsdp2", 2, True), ("3d:pp=2", 2, False)]
)
def test_a_run_warns_of_nothing_that_could_be_avoided(
    home: Path, tmp_path: Path, strategy: str, devices: int, lora: bool
) -> None:
    job = Job(tmp_path / "logs", fit_and_validate, home, strategy, devices, lora, world_size=devices)
    codes = job.wait(300)
    printed = [job.log(rank) for rank in range(devices)]
    assert codes == [0] * devices, "\n".join(printed)
    lines = [line.removeprefix("WARNING ") for log in printed for line in log.splitlines() if "WARNING {" in line]
    found = [json.loads(line[line.index("{") :]) for line in lines]
    assert not [w for w in found if any(words in w["says"] for words in GONE)]
    assert not [w for w in found if w["kind"] and w["place"].startswith(OWN)]
