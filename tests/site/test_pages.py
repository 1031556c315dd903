"""Every code block of docs/index.md and docs/guides/ runs; the pages of errors and the drawings are of this code."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from automodel_trainer import KernelsConfig, LoRAConfig, StrategyRegistry
from automodel_trainer.callbacks import Ledger, Watchdog
from tests.processes import amt, call, run_code
from tests.tiny import save_tiny_model, write_chats

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / "index.md", *sorted((DOCS / "guides").glob("*.md"))]
sys.path.insert(0, str(DOCS / "site"))

import drawings  # noqa: E402
import errors  # noqa: E402


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guides")
    save_tiny_model(folder / "my-model")
    write_chats(folder / "chats.jsonl", 60)
    texts = [json.dumps({"text": "two and two are four. " * 20}) + "\n" for _ in range(40)]
    (folder / "corpus.jsonl").write_text("".join(texts))
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_blocks_run(page: Path, home: Path) -> None:
    """In order. A YAML block names its file; where no command of the page takes it, it is a run of its own."""
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL):
        if language == "yaml":
            name = re.match(r"# (\w+\.yaml)", block)
            assert name is not None, block
            (home / name[1]).write_text(block)
            if f"--config {name[1]}" not in text:
                amt("fit", "--config", name[1], folder=home)
        elif language == "python":
            call(home, run_code, block, home / f"{page.stem}.py")
        elif language == "bash":
            for line in block.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "amt"
                amt(*arguments, folder=home)
        else:
            assert language == "text", f"{page.name}: a block in {language} that nothing runs"


def test_every_raised_text_is_on_a_page() -> None:
    """With an anchor of its own; only errors that pass on another one's text have none."""
    found = errors.messages()
    assert len(found) > 550
    assert len({message.anchor for message in found}) == len(found)
    written = "".join(errors.pages().values())
    assert all(f"{{ #{message.anchor} }}" in written for message in found)
    last_words = {re.findall(r"\w+", expression)[-1] for expression in errors.passed_on()}
    assert last_words <= {"error", "texts", "where", "message"}
    texts = [message.text for message in found]
    for words in (
        "got no gradient in the first step",
        "half of a character",
        "Streamed rows are packed",
        "is not UTF-8",
    ):
        assert any(words in text for text in texts), words
    raised = (ROOT / "automodel_trainer", ROOT / "strategies", ROOT / "callbacks")
    calls = sum(
        len(re.findall(r"\braise ValueError\(", file.read_text())) for root in raised for file in root.rglob("*.py")
    )
    assert len(found) > 0.9 * calls


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LoRAConfig(rank=0),
        lambda: LoRAConfig(dropout=2.0),
        lambda: Ledger(allow=["nothing"]),
        lambda: Watchdog(silence=0),
        lambda: KernelsConfig(norm="fast"),
        lambda: StrategyRegistry.get("fsdp3"),
    ],
)
def test_what_is_raised_is_found(wrong: Callable[[], object]) -> None:
    """The text of a page, with anything where it has …, is the message that a user sees."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        wrong()
    patterns = [".*".join(map(re.escape, message.text.split(errors.GAP))) for message in errors.messages()]
    assert any(re.fullmatch(pattern, str(raised.value), re.DOTALL) for pattern in patterns if len(pattern) > 30)


def test_the_drawings_are_of_the_script() -> None:
    for name, draw in drawings.DRAWINGS.items():
        assert (DOCS / "drawings" / name).read_text(encoding="utf-8") == draw(), "`make pictures` draws it again"
