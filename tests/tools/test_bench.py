"""`amt bench`: what it measures against clocks and counts of its own, and what it leaves alone."""

from __future__ import annotations

import gzip
import json
import math
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from automodel_trainer import CausalLMModule, MockDataModule, Trainer
from automodel_trainer.callbacks.counts import Totals
from automodel_trainer.cli import main
from automodel_trainer.tools import bench_ceilings
from automodel_trainer.tools.bench import bench
from automodel_trainer.tools.bench_ceilings import AttentionShape, Ceilings, measure_ceilings
from automodel_trainer.tools.bench_profile import Kernel, picture, table
from automodel_trainer.tools.bench_report import Work, efficiency, results, text
from tests.pool import RankPool
from tests.tiny import tiny_model, tiny_tokenizer

CEILINGS = Ceilings(matmul=1e12, attention=5e11, copy=1e10)


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("automodel_trainer.tools.bench.measure_ceilings", lambda *_: CEILINGS)


class Slow(Callback):
    """Makes every step and every batch take their time."""

    def __init__(self, step: float, batch: float) -> None:
        self.step, self.batch = step, batch

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(self.step)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.datamodule.sleep = self.batch  # type: ignore[attr-defined]


class SlowData(MockDataModule):
    sleep = 0.0

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        inner = loader.__class__.__iter__

        class Waiting(loader.__class__):  # type: ignore[misc, name-defined]
            def __iter__(own) -> Any:
                for batch in inner(own):
                    time.sleep(self.sleep)
                    yield batch

        loader.__class__ = Waiting
        return loader


def trainer_of(root: Path, **options: Any) -> Trainer:
    return Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 3, "default_root_dir": root, **options})


def data_of(**options: Any) -> SlowData:
    return SlowData(**{"vocab_size": 264, "seq_len": 32, "micro_batch_size": 2, "num_samples": 64, **options})


def test_steps_data_and_tokens_are_what_they_are(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, callbacks=[Slow(0.05, 0.03)], val_check_interval=2)
    found = bench(trainer, CausalLMModule(tiny_model()), data_of(global_batch_size=4), warmup=2, steps=5)
    assert trainer.global_step == 7
    assert (found["steps"], found["devices"], found["device"]) == (5, 1, "cpu")
    assert 0.08 < found["step_seconds"] < 0.8
    assert found["data_share"] * found["step_seconds"] * 1.5 >= 0.03
    assert found["data_share"] < 0.6
    assert found["tokens_per_second"] == pytest.approx(4 * 32 / found["step_seconds"])
    assert found["peak_memory_gib"] > 0.05
    trained = sum(
        p.numel() for n, p in trainer.lightning_module.model.named_parameters() if "embed" not in n and p.ndim > 1
    )
    attention = 3 * 2 * 2 * 4 * (8 + 8) * 16.5  # both ways, 2 layers, 4 heads, keys and values of 8, mean keys
    speed = found["tokens_per_second"]
    assert found["tflops_per_device"] == pytest.approx((6 * trained + attention) * speed / 1e12, rel=0.01)
    assert found["share_of_ceilings"] == pytest.approx(speed * (6 * trained / 1e12 + attention / 5e11), rel=0.01)
    assert "mfu" not in found  # the peak of a CPU is not known
    assert not list(tmp_path.iterdir())


def test_results_and_text() -> None:
    totals = Totals(rows=20, tokens=20 * 1000)
    found = results([0.1] * 8 + [0.2, 0.3], [3.1, 0.1], 0.13, totals, world_size=2)
    assert found["step_seconds"] == 0.1
    assert found["step_seconds_spread"] == pytest.approx(0.05)
    assert found["startup_seconds"] == pytest.approx(3.0)
    assert found["data_share"] == pytest.approx(0.1)
    assert (found["tokens_per_second"], found["tokens_per_second_per_device"]) == pytest.approx((20000, 10000))
    found |= efficiency(10000, Work(matmul=5e7, attention=1e7), CEILINGS, peak=2e12)
    assert found["mfu"] == pytest.approx(0.3)
    assert found["share_of_ceilings"] == pytest.approx(0.5 + 0.2)
    said = text({**found, "peak_memory_gib": 1.5})
    for part in (
        "100.00 ms ± 50.0 % (median of 10 steps)",
        "20,000 tok/s",
        "MFU 30.0%",
        "70.0%",
        "14,286",
        "3.0 s more",
    ):
        assert part in said, part
    samples = results([0.5], [0.5], 0.0, Totals(rows=4), 1)
    assert samples["samples_per_second"] == 8
    assert "8.0 samples/s" in text({**samples, "peak_memory_gib": 1.0})


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is the operations, as torch counts them, of the fastest call."""
    counted: list[float] = []

    def best(call: Any, device: torch.device) -> float:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
        counted.append(counter.get_total_flops())
        return 2.0

    monkeypatch.setattr(bench_ceilings, "_best", best)
    shape = AttentionShape(2, 4, 128, 16)
    found = measure_ceilings(torch.device("cpu"), torch.float32, shape)
    assert found.matmul == counted[0] / 2
    assert found.attention == pytest.approx(counted[1] * (128 + 1) / 2 / 128 / 2)  # torch counts the masked keys too
    assert found.copy == 2**25
    monkeypatch.undo()
    started = time.perf_counter()
    real = bench_ceilings._best(lambda: time.sleep(0.002), torch.device("cpu"), seconds=0.02)
    assert 0.002 <= real < time.perf_counter() - started


def test_profile_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "default_root_dir": str(tmp_path / "run")},
        "model": {"model": str(tmp_path / "model"), "lora": {"rank": 2}, "scheduler": {"warmup_steps": 15}},
        "data": {"class_path": "MockDataModule", "init_args": {"seq_len": 32, "num_samples": 12, "val_samples": 2}},
    }
    config["trainer"]["callbacks"] = [{"class_path": "DCPCheckpoint"}, {"class_path": "HFExport"}]  # type: ignore[assignment]
    file, folder = tmp_path / "config.yaml", tmp_path / "profile"
    file.write_text(yaml.safe_dump(config))
    short = ["bench", "--config", str(file), "--warmup", "2", "--steps", "3"]
    main([*short, "--profile", str(folder)])
    said = capsys.readouterr().out
    assert "(median of 3 steps)" in said
    assert "| kernel |" in said
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    assert "`aten::mm`" in (folder / "kernels.md").read_text()
    assert len((folder / "kernels.md").read_text().splitlines()) == 12
    ElementTree.fromstring((folder / "kernels.svg").read_text())
    assert not (tmp_path / "run").exists()
    main([*short, "--json", "--trainer.max_steps", "2", "--model.scheduler.warmup_steps", "0"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["steps"] == 3
    assert math.isfinite(found["tokens_per_second"])
    with pytest.raises(SystemExit):
        main([*short, "--warmup", "90"])
    assert "ended after 36 optimizer step(s), before one was measured" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*short, "--steps", "32", "--profile", str(folder)])
    assert "ended after 36 optimizer step(s), but --profile needs 3 steps after step 34" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*short, "--steps", "0"])
    assert "both must be at least 1" in capsys.readouterr().err


def test_pictures_take_any_name() -> None:
    kernels = [Kernel("void cutlass::Kernel<a & b | c>(Params)" * 4, 12.0, 3.25, 0.4), Kernel("x", 1.0, 0.5, 0.1)]
    texts = [node.text for node in ElementTree.fromstring(picture(kernels)).iter() if node.tag.endswith("text")]
    assert texts[1].startswith("void cutlass::Kernel<a & b | c>")  # type: ignore[union-attr]
    assert texts[2] == "3.25 (40.0%)"
    assert all(line.replace("\\|", "").count("|") == 5 for line in table(kernels).splitlines())


def on_ranks(root: Path) -> dict[str, Any]:
    trainer = trainer_of(root, strategy="fsdp2", devices="auto")
    return bench(trainer, CausalLMModule(tiny_model()), data_of(num_samples=256), warmup=1, steps=3)


def test_two_ranks_count_each_other(pool: RankPool, tmp_path: Path) -> None:
    for found in pool.run(2, on_ranks, tmp_path):
        assert found["devices"] == 2
        assert found["tokens_per_second"] == pytest.approx(2 * 2 * 32 / found["step_seconds"])
        assert found["tokens_per_second_per_device"] == found["tokens_per_second"] / 2
        assert found["share_of_ceilings"] > 0
