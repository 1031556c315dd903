"""Every file in examples/ runs with a tiny model, and is short."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import amt, call, run_code
from tests.tiny import save_tiny_model, write_chats

EXAMPLES = Path(__file__).parents[1] / "examples"
ARGUMENTS = {
    "lora": ("my-model", "chats.jsonl", "2"),
    "own_rows": ("my-model", "2"),
    "lr_sweep": ("my-model", "chats.jsonl", "4", "2"),
    "callback": ("my-model", "chats.jsonl", "3", "100"),
    "lightning_module": ("my-model", "2"),
    "own_loop": ("my-model", "2"),
    "needle": ("my-model", "320", "1", "1"),
    "resume": ("my-model", "chats.jsonl", "2"),
}
PRINTED = {
    "callback": "stopped at step 1",
    "own_loop": "step 1: loss",
    "resume": "step 4",
    "lr_sweep": "best: lr",
    "own_rows": "tensor(",
    "needle": "after 0% deep: ",
}
NOT_OURS = {"model.model": "my-model", "trainer.accelerator": "cpu"}
STEPS = {"trainer.max_steps": "2"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    save_tiny_model(folder / "my-model")
    for name in ("chats", "math"):
        write_chats(folder / f"{name}.jsonl", 60)
    return folder


def test_every_file_is_known_and_short() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == ARGUMENTS.keys()
    table = (EXAMPLES / "README.md").read_text()
    for file in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.yaml")]:
        assert len(file.read_text().splitlines()) <= 60, file.name
        assert f"`{file.name}`" in table


@pytest.mark.parametrize("name", ARGUMENTS)
def test_python(name: str, home: Path) -> None:
    if name == "lr_sweep":
        pytest.importorskip("ray.tune")
    file = EXAMPLES / f"{name}.py"
    printed = call(home, run_file, file, ARGUMENTS[name])
    assert PRINTED.get(name, "") in printed


def run_file(file: Path, arguments: tuple[str, ...]) -> None:
    run_code(file.read_text(), file, *arguments)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_yaml(file: Path, home: Path) -> None:
    options = {**NOT_OURS, **STEPS, "trainer.default_root_dir": f"runs/yaml-{file.stem}"}
    if file.stem == "mixture":
        options["trainer.val_check_interval"] = "2"
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    amt("fit", "--config", file, *given, folder=home, path=[EXAMPLES])
