"""What the progress line shows, in a file and in a terminal, and that it looks at the device at log steps only."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from automodel_trainer.callbacks import ProgressLine, progress
from automodel_trainer.callbacks.console import LiveLine, show
from automodel_trainer.callbacks.progress_text import (
    duration,
    evaluation_line,
    fitted,
    loss_change,
    metric_texts,
    throughput_texts,
)
from automodel_trainer.modules import CausalLMModule
from automodel_trainer.trainer import Trainer
from tests.pool import RankPool
from tests.tiny import tiny_model

QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_ledger": False}


def micro_batch() -> dict[str, Tensor]:
    ids = torch.arange(1, 17).view(2, 8)  # always the same, so that there is something to learn
    labels = ids.clone()
    labels[:, 0] = -100  # 14 of 16 are supervised
    return {"input_ids": ids, "labels": labels}


def validation() -> DataLoader[Any]:
    return DataLoader([micro_batch(), micro_batch()], batch_size=None)  # type: ignore[arg-type]


def fit(folder: Path, validate: bool = True, lr: float = 0.01, **options: Any) -> Trainer:
    settings = {**QUIET, "max_steps": 6, "log_every_n_steps": 2, "num_sanity_val_steps": -1, **options}
    trainer = Trainer(**settings, default_root_dir=folder)
    batches = [[micro_batch()] for _ in range(6)]
    trainer.fit(CausalLMModule(tiny_model(), lr=lr), batches, validation() if validate else None)
    return trainer


def test_a_file_gets_a_line_for_each_log_step_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(tmp_path)
    printed = capsys.readouterr().out
    assert "\r" not in printed
    assert "\x1b" not in printed
    steps = re.findall(r"^step (\d)/6  loss \d\.\d{3}  lr \S+  [\d,]+ tok/s  sup 88%  mem \d\.\d GiB", printed, re.M)
    assert steps == ["2", "4", "6"]
    assert re.search(r"^step 4/6 .* 0:0\d left$", printed, re.M)
    losses = re.findall(
        r"^validation (?:before training|after step 6): loss (\S+), perplexity \S+, token accuracy \d+%$", printed, re.M
    )
    before, after = map(float, losses)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(after, abs=1e-3)
    assert after < before
    summary = re.search(r"training finished\n  steps +6 of 6 in 0:0\d\n  tokens +96 ", printed)
    assert summary, printed
    change = re.search(r"validation loss  (\S+) → (\S+) \(−(\d+)%\)", printed)
    assert change, printed
    assert [float(change[1]), float(change[2])] == pytest.approx([before, after], abs=0.006)
    assert int(change[3]) == round(100 * (before - after) / before)
    assert f"checkpoint       {tmp_path / 'checkpoints' / 'step-00000006'}\n" in printed


def test_a_check_on_part_of_the_data_is_no_loss_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, num_sanity_val_steps=1)
    printed = capsys.readouterr().out
    assert "before training" not in printed
    assert re.search(r"^  validation loss  \d\.\d\d$", printed, re.M)


def test_without_validation_and_checkpoints_there_is_less_to_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, validate=False, enable_checkpointing=False, enable_throughput=False)
    printed = capsys.readouterr().out
    assert re.search(r"^step 4/6  loss \S+  lr \S+  0:0\d left$", printed, re.M)
    assert re.search(r"training finished\n  steps  6 of 6 in 0:0\d\n$", printed)


def test_metrics_are_read_at_log_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    class Watched(ProgressLine):
        def _read_values(self, trainer: pl.Trainer) -> list[str]:
            looked.append(trainer.global_step)
            return super()._read_values(trainer)

    fit(tmp_path, callbacks=[Watched()], log_every_n_steps=3)
    assert looked == [3, 6]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], io.StringIO]:
    """Makes the progress line believe that it writes to a terminal of so many columns."""

    def pretend(width: int) -> io.StringIO:
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=True, width=width, height=40, _environ={})
        monkeypatch.setattr(progress, "is_terminal", lambda: True)
        monkeypatch.setattr(progress, "LiveLine", lambda: LiveLine(console))
        monkeypatch.setattr(progress, "REFRESH_SECONDS", -1.0)
        return screen

    return pretend


def drawn(screen: io.StringIO) -> list[str]:
    return [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", screen.getvalue()).split("\n") if line.strip()]


def test_a_terminal_gets_a_line_that_moves(tmp_path: Path, terminal: Callable[[int], io.StringIO]) -> None:
    screen = terminal(120)
    streams = sys.stdout, sys.stderr
    trainer = fit(tmp_path)
    lines = drawn(screen)
    assert {line.split()[1] for line in lines if line.startswith("step")} == {f"{i}/6" for i in range(7)}
    assert any(re.match(r"step 6/6  loss \S+  lr \S+  [\d,]+ tok/s  sup 88%  mem \S+ GiB", line) for line in lines)
    assert {"validation 1/2", "validation 2/2"} <= set(lines)
    assert sum(line.startswith("validation after step 6: loss") for line in lines) == 1
    assert (sys.stdout, sys.stderr) == streams
    assert screen.getvalue().rstrip().endswith("\x1b[2K")  # the line is gone: nothing of it stays behind
    assert trainer.progress_bar_callback is not None


def test_what_others_print_scrolls_above_the_line(
    tmp_path: Path, terminal: Callable[[int], io.StringIO], capsys: pytest.CaptureFixture[str]
) -> None:
    screen = terminal(120)
    logger = logging.getLogger("some.library")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)

    class Chatty(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                print("a print")
                logger.warning("a log message")
                show(trainer, "a shown text")

    fit(tmp_path, callbacks=[Chatty()])
    logger.removeHandler(handler)
    lines = drawn(screen)
    assert all(lines.count(text) == 1 for text in ("a print", "a log message", "a shown text"))
    assert handler.stream is sys.stderr
    assert "a log message" not in capsys.readouterr().err


def test_an_exception_gives_the_terminal_back(tmp_path: Path, terminal: Callable[[int], io.StringIO]) -> None:
    screen = terminal(120)
    streams = sys.stdout, sys.stderr

    class Broken(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, callbacks=[Broken()])
    assert (sys.stdout, sys.stderr) == streams
    assert screen.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in screen.getvalue()  # the cursor is back


class Own(pl.LightningModule):
    """A user's own module with a metric for the bar."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log_dict({"loss": loss, "margin": 0.125}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_a_users_module_in_lightnings_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 4)), batch_size=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[ProgressLine()],
        max_epochs=2,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        default_root_dir=tmp_path,
    )
    trainer.fit(Own(), data)
    printed = capsys.readouterr().out
    lines = re.findall(r"^step (\d)/8  loss \d\.\d{3}  lr 5\.0e-2  margin 0\.125  0:00 left$", printed, re.M)
    assert lines == ["2", "4", "6", "8"]


def on_rank(folder: str) -> str:
    out = io.StringIO()
    before, sys.stdout = sys.stdout, out
    try:
        fit(Path(folder), devices=2, strategy="ddp", enable_checkpointing=False)
    finally:
        sys.stdout = before
    return out.getvalue()


def test_only_the_first_rank_speaks(pool: RankPool, tmp_path: Path) -> None:
    first, second = pool.run(2, on_rank, str(tmp_path))
    assert first.count("step 6/6") == first.count("training finished") == 1
    assert second == ""


def test_texts() -> None:
    assert [duration(s) for s in (0.4, 34, 725, 3723)] == ["0:00", "0:34", "12:05", "1:02:03"]
    assert loss_change([4.03, 3.0, 2.43]) == "4.03 → 2.43 (−40%)"
    assert loss_change([2.0, 2.5]) == "2.00 → 2.50 (+25%)"
    assert loss_change([2.0, float("nan")]) == "2.00 → nan"
    assert loss_change([2.43]) == "2.43"
    metrics = {"val_loss": torch.tensor(2.43), "val_perplexity": 11.4, "val_token_accuracy": 0.52, "val_bleu": 0.25}
    assert evaluation_line(metrics, "val_") == "loss 2.430, perplexity 11.4, token accuracy 52%, bleu 0.25"
    assert metric_texts({"train_loss": torch.tensor(2.431), "lr": 3e-4}, {}, 1.0) == ["loss 2.431", "lr 3.0e-4"]
    values = {"tokens_per_second": 1530.4, "supervised_share": 0.62, "peak_memory_gib": 3.1, "mfu": 0.41}
    assert throughput_texts(values) == ["1,530 tok/s", "sup 62%", "mem 3.1 GiB", "mfu 41%"]
    assert throughput_texts({"data_wait": 0.2}) == ["data wait 20%"]


def test_a_narrow_terminal_keeps_the_step_and_the_time_left() -> None:
    parts = ["step 1/2", "loss 1.000", "mem 3.0 GiB", "0:34 left"]
    assert fitted(parts) == "step 1/2  loss 1.000  mem 3.0 GiB  0:34 left"
    assert fitted(parts, width=35) == "step 1/2  loss 1.000  0:34 left"
    assert fitted(parts, width=5) == "step 1/2  0:34 left"
    assert fitted(["validation 1/2"], width=80) == "validation 1/2"
