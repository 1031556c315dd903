"""The code blocks of docs/coming_from_lightning.md and docs/loggers.md run, and their tables are of this code."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from automodel_trainer import Trainer
from automodel_trainer.callbacks import DCPCheckpoint
from tests.processes import amt, call, run_code
from tests.tiny import tiny_model, tiny_tokenizer

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("coming_from_lightning", "loggers")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    tiny_model().save_pretrained(folder / "my-model")
    tiny_tokenizer().save_pretrained(folder / "my-model")
    turns = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(40)))
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, home: Path) -> None:
    text = (DOCS / f"{page}.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        call(home, run_code, block, home / f"{page}.py")
    for line in "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines():
        amt(*shlex.split(line)[1:], folder=home)


def test_every_argument_is_taken() -> None:
    """Of Lightning's Trainer, and of its ModelCheckpoint."""
    for ours, theirs in ((Trainer, pl.Trainer), (DCPCheckpoint, ModelCheckpoint)):
        lacking = inspect.signature(theirs.__init__).parameters.keys() - inspect.signature(ours.__init__).parameters
        assert not lacking, (ours, lacking)
