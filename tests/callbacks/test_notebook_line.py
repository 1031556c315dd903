"""The progress of a run in a notebook: HTML that is replaced in place, with the curve. The kernel here is a stand-in;
`make notebooks` runs real ones."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest

from automodel_trainer import CausalLMModule, ChatDataModule, Trainer
from automodel_trainer.callbacks import BatchPreview, notebook, progress
from automodel_trainer.data.preview import Preview
from automodel_trainer.nn.chart import COLOURS, HEIGHT, LEFT, WIDTH, chart
from tests.callbacks.test_progress import QUIET, fit, micro_batch
from tests.tiny import tiny_model, tiny_tokenizer

SCRIPT = "<script>document.title='taken'</script>"


class Screen:
    """What a kernel was told to show: every element with all it has held, oldest first."""

    def __init__(self) -> None:
        self.elements: list[list[Any]] = []

    def display(self, shown: Any, display_id: bool = False) -> Any:
        element = [shown]
        self.elements.append(element)
        return SimpleNamespace(update=element.append) if display_id else None

    def html(self) -> list[str]:
        """Of each element, what it holds at last."""
        return [element[-1]._repr_html_() for element in self.elements]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    screen = Screen()
    ipython, shown = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    shown.display = screen.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", -1.0)
    return screen


class Parsed(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def points(self) -> int:
        """Of the curve."""
        return sum(len((attributes["points"] or "").split()) for tag, attributes in self.tags if tag == "polyline")


def test_one_element_with_the_curve(screen: Screen, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(tmp_path)
    (element,) = screen.elements
    lines = [Parsed(shown._repr_html_()) for shown in element]
    assert {f"step {step}/6" for step in range(7)} <= {
        match for line in lines for match in re.findall(r"step \d/6", line.text)
    }
    sixth = next(line for line in lines if "step 6/6" in line.text and "loss" in line.text)
    for words in (r"loss \d\.\d{3}", "lr ", r"tok/s", "sup 88%", r"mem \d\.\d GiB"):
        assert re.search(words, sixth.text), words
    assert any("0:00 left" in line.text for line in lines)
    last = lines[-1]
    assert last.points() == 3  # log steps 2, 4 and 6
    assert sum(tag == "circle" for tag, _ in last.tags) == 2  # validation before and after
    assert "training finished" in last.text
    assert "validation loss" in last.text
    assert "training finished\n  steps" in repr(element[-1])
    assert "step" not in capsys.readouterr().out
    assert trainer.global_step == 6


def test_a_worker_process_and_a_terminal_get_text(
    screen: Screen, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In workers that `fit` has forked nobody would receive HTML; IPython in a terminal shows none."""
    monkeypatch.setattr(notebook, "parent_process", lambda: object())
    fit(tmp_path / "worker", validate=False)
    monkeypatch.setattr(notebook, "parent_process", lambda: None)
    sys.modules["IPython"].get_ipython = lambda: SimpleNamespace()  # type: ignore[attr-defined]
    fit(tmp_path / "terminal", validate=False)
    assert not screen.elements
    assert capsys.readouterr().out.count("step 6/6") == 2


def test_what_a_module_logs_stays_text(screen: Screen, tmp_path: Path) -> None:
    class Hostile(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.log(SCRIPT, 1.0, prog_bar=True)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.callback_metrics[f"val_{SCRIPT}"] = 1.0

    fit(tmp_path, callbacks=[Hostile(), progress.ProgressLine()], enable_ledger=True)
    for element in screen.elements:
        for shown in element:
            assert "script" not in {tag for tag, _ in Parsed(shown._repr_html_()).tags}
    assert any(SCRIPT in Parsed(shown._repr_html_()).text for element in screen.elements for shown in element)
    assert any("AdamW" in html and "<table>" in html for html in screen.html())  # the ledger


def test_a_kernel_is_not_flooded(screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 1000.0)
    fit(tmp_path, log_every_n_steps=1, validate=False)
    (element,) = screen.elements
    assert len(element) == 2  # the first line, and the summary
    assert Parsed(element[-1]._repr_html_()).points() == 6


def test_a_trainer_and_a_preview(screen: Screen, tmp_path: Path) -> None:
    """A Trainer before and after a run; the first batch before it, and as a callback shows it."""
    chats = [{"messages": [{"role": "user", "content": SCRIPT}, {"role": "assistant", "content": f"{SCRIPT} four"}]}]
    data = ChatDataModule(chats * 8, tokenizer=tiny_tokenizer(), seq_len=256, micro_batch_size=2)
    module = CausalLMModule(tiny_model(), lr=0.01)
    folder = tmp_path / SCRIPT.replace("/", "")
    trainer = Trainer(
        **{**QUIET, "enable_ledger": True},
        max_steps=2,
        log_every_n_steps=1,
        callbacks=[BatchPreview()],
        default_root_dir=folder,
    )
    before = Parsed(trainer._repr_html_())
    for words in ("FSDP2Strategy on 1 × CPU", "has not run yet", "at most 2 steps", folder.name):
        assert words in before.text, words
    shown = trainer.preview(module, data)
    parsed = Parsed(shown._repr_html_())
    assert sum("trained" in (attributes.get("class") or "").split() for _, attributes in parsed.tags) > 2
    assert shown.counts.supervised > 0
    assert "four" in repr(shown)
    trainer.fit(module, data)
    after = Parsed(trainer._repr_html_())
    for words in ("fit: finished, step 2", "train_loss", "step-00000002", "AdamW"):
        assert words in after.text, words
    callback = next(element[0] for element in screen.elements if isinstance(element[0], Preview))
    assert Parsed(callback._repr_html_()).text == parsed.text
    for page in (before, parsed, after):
        assert "script" not in {tag for tag, _ in page.tags}
    with pytest.raises(ValueError, match="preview cannot show list"):
        trainer.preview(module, [[micro_batch()]])


def test_chart() -> None:
    """Coordinates by hand: the axes go from the first to the last step, and from the lowest to the highest value."""
    assert chart({"a": {}, "b": {1: float("nan")}}) == ""
    found = Parsed(chart({"a": {0: 1.0, 5: 3.0, 10: 2.0}, SCRIPT: {5: 1.0}, "c": {2: 1.0, 3: 1.0}}, dots=("c",)))
    line = next(attributes for tag, attributes in found.tags if tag == "polyline")
    right = WIDTH - 8
    middle = LEFT + (right - LEFT) / 2
    low = HEIGHT - 24
    assert line["points"] == f"{LEFT}.0,{low}.0 {middle},10.0 {right}.0,{(low + 10) / 2}"
    circles = [attributes for tag, attributes in found.tags if tag == "circle"]
    assert [circle["stroke"] for circle in circles] == [COLOURS[1], COLOURS[2], COLOURS[2]]
    assert "script" not in {tag for tag, _ in found.tags}
    thinned = Parsed(chart({"a": {step: float(step) for step in range(1001)}}, points=100))
    assert thinned.points() <= 101
    longer = Parsed(chart({"a": {0: 1.0, 5: 3.0}}, last_step=10))
    assert f"{middle}," in str(next(attributes["points"] for tag, attributes in longer.tags if tag == "polyline"))
