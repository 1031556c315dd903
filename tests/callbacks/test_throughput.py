"""Throughput: what is counted, which time counts, and that nothing waits for the device."""

from __future__ import annotations

import csv
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from automodel_trainer.callbacks import Throughput, rank_times, stragglers
from automodel_trainer.callbacks import throughput as throughput_file
from automodel_trainer.callbacks.counts import Counts
from automodel_trainer.callbacks.device_probe import DeviceProbe
from automodel_trainer.callbacks.stacks import frame_of, waits_for_ranks
from automodel_trainer.modules import CausalLMModule
from automodel_trainer.nn.flops import flops_per_token
from automodel_trainer.trainer import Trainer
from tests.pool import RankPool
from tests.tiny import tiny_model

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_ledger": False,
}


def micro_batch(rows: int = 2, length: int = 8, unsupervised: int = 0) -> dict[str, Any]:
    ids = torch.randint(1, 200, (rows, length))
    labels = ids.clone()
    labels[:, :unsupervised] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length).expand(rows, length)}


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    process_time = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(
        throughput_file, "time", SimpleNamespace(perf_counter=fake.perf_counter, process_time=fake.process_time)
    )
    return fake


class TimedModule(CausalLMModule):
    """Takes 50 s for its first step, 1 s for every other, 100 s for a validation batch and 1000 s for a checkpoint."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(tiny_model(), lr=0.0)
        self.clock = clock

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.clock.now += 50 if self.trainer.global_step == 1 else 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.clock.now += 100

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock.now += 1000


class TimedLoader:
    """Every batch takes 0.25 s to come."""

    def __init__(self, clock: Clock, batches: list[Any]) -> None:
        self.clock, self.batches = clock, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.clock.now += 0.25
            yield batch


def test_only_training_time_counts(clock: Clock, tmp_path: Path) -> None:
    batches = [[micro_batch(), micro_batch(unsupervised=4)] for _ in range(7)]
    throughput = Throughput(peak_flops=1e6)
    options = {**QUIET, "enable_checkpointing": True}
    trainer = Trainer(
        **options,
        callbacks=[throughput],
        max_steps=7,
        log_every_n_steps=3,
        num_sanity_val_steps=-1,
        val_check_interval=2,
        default_root_dir=tmp_path,
    )
    module = TimedModule(clock)
    trainer.fit(module, TimedLoader(clock, batches), DataLoader([micro_batch()], batch_size=None))
    # Steps 4 to 6: 3 s of training. Validation follows steps 4 and 6; the gap after step 4 held a validation, so only
    # the waits before steps 4 and 6 are known to be for data.
    seconds, tokens = 3 + 2 * 0.25, 3 * 2 * 16
    assert throughput.last["tokens_per_second"] == pytest.approx(tokens / seconds)
    assert throughput.last["tokens_per_second_per_device"] == pytest.approx(tokens / seconds)
    assert throughput.last["data_wait"] == pytest.approx(0.5 / seconds)
    assert throughput.last["supervised_share"] == pytest.approx(24 / 32)
    assert throughput.last["mfu"] == pytest.approx(flops_per_token(module.model, 8) * tokens / seconds / 1e6)
    assert throughput.last["mfu"] == pytest.approx(throughput.last["tflops_per_device"] * 1e6)
    assert 0.05 < throughput.last["peak_memory_gib"] < 50
    assert throughput.tokens_seen == 7 * 32


def test_the_first_step_and_checkpoints_do_not_count(clock: Clock, tmp_path: Path) -> None:
    from automodel_trainer.callbacks import DCPCheckpoint

    throughput = Throughput()
    trainer = Trainer(
        **{**QUIET, "enable_checkpointing": True},
        callbacks=[throughput, DCPCheckpoint(every_n_steps=1)],
        max_steps=4,
        log_every_n_steps=4,
        default_root_dir=tmp_path,
    )
    trainer.fit(TimedModule(clock), TimedLoader(clock, [[micro_batch()] for _ in range(4)]))
    assert clock.now > 3000
    assert throughput.last["tokens_per_second"] == pytest.approx(3 * 16 / 3)
    assert throughput.last["data_wait"] == 0  # every wait had a checkpoint in it


def test_numbers_reach_the_logger_at_log_steps_only(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    options = {**QUIET, "logger": logger}
    trainer = Trainer(**options, max_steps=6, log_every_n_steps=2, default_root_dir=tmp_path)
    trainer.fit(CausalLMModule(tiny_model()), [[micro_batch()] for _ in range(6)])
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["tokens_per_second"]]
    assert [row["step"] for row in rows] == ["1", "3", "5"]  # Lightning counts from 0
    names = {"tokens_per_second", "tokens_per_second_per_device", "peak_memory_gib", "data_wait", "supervised_share"}
    assert names | {"tflops_per_device", "train_loss"} <= rows[0].keys()
    assert "mfu" not in rows[0]  # nothing is known of a CPU's peak


def test_counts() -> None:
    masked = micro_batch(rows=1, length=6)
    masked["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0]])
    packed = micro_batch(rows=2, length=8)
    packed["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]])
    counts = Counts()
    counts.add([masked, packed])
    totals = counts.totals()
    assert (totals.rows, totals.tokens, totals.labels, totals.supervised) == (3, 22, 22, 22)
    assert (totals.masked_tokens, totals.padding) == (6, 2)
    # Attention over rows of the mean document costs what it does over these documents.
    pairs = sum(n * (n + 1) / 2 for n in (6, 3, 5, 8))
    assert totals.tokens * (totals.mean_document() + 1) / 2 == pytest.approx(pairs)


class NoHostSync(TorchDispatchMode):
    """Raises where a value of a tensor is read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default), func
        assert func is not torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


def test_counting_reads_no_value_of_a_tensor() -> None:
    counts = Counts()
    with NoHostSync():
        counts.add([{**micro_batch(), "attention_mask": torch.ones(2, 8)}])
    with pytest.raises(AssertionError), NoHostSync():  # the guard does see it
        micro_batch()["labels"].sum().item()


class Classifier(pl.LightningModule):
    """A user's own module on data that has no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("own", [True, False])
def test_a_users_module_gets_samples_per_second(own: bool, tmp_path: Path, clock: Clock) -> None:
    class Timed(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            clock.now += 1
            return super().training_step(batch, batch_idx)

    data = DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 4)), batch_size=4)
    options: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 2, "accumulate_grad_batches": 2}
    throughput = Throughput()
    if own:
        trainer: pl.Trainer = Trainer(**QUIET, **options, callbacks=[throughput], default_root_dir=tmp_path)
    else:
        quiet = {key: value for key, value in QUIET.items() if key != "enable_ledger"}
        trainer = pl.Trainer(**quiet, **options, callbacks=[throughput], default_root_dir=tmp_path)
    trainer.fit(Timed(), data)
    assert throughput.last["samples_per_second"] == 4  # a batch of 4 a second
    assert "tokens_per_second" not in throughput.last
    assert "mfu" not in throughput.last


@pytest.mark.parametrize(
    "batch", [torch.ones(3, 2), [torch.ones(5)], {"image": torch.ones(7, 3)}, "text", None, [1, 2]]
)
def test_any_batch_can_be_counted(batch: Any) -> None:
    counts = Counts()
    counts.add(batch)
    expected = next((len(t) for t in (torch.utils._pytree.tree_leaves(batch)) if isinstance(t, Tensor)), 0)
    assert counts.totals().rows == expected
    assert counts.totals().tokens == 0


class LateLoader:
    """Every batch takes so many seconds to come."""

    def __init__(self, batches: list[Any], seconds: float) -> None:
        self.batches, self.seconds = batches, seconds

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            time.sleep(self.seconds)
            yield batch


def two_ranks(strategy: str, folder: str) -> tuple[dict[str, float], int]:
    throughput = Throughput()
    options = {**QUIET, "devices": 2}
    trainer = Trainer(
        **options, strategy=strategy, callbacks=[throughput], max_steps=4, log_every_n_steps=2, default_root_dir=folder
    )
    length = 8 * (1 + trainer.global_rank)  # padded batches are not equally wide on all ranks
    batches = [[micro_batch(length=length, unsupervised=length // 2 * trainer.global_rank)] for _ in range(4)]
    trainer.fit(CausalLMModule(tiny_model()), LateLoader(batches, 0.1 * trainer.global_rank))
    return throughput.last, throughput.tokens_seen


def test_tokens_of_all_ranks_count(pool: RankPool, tmp_path: Path) -> None:
    (first, seen), (second, also_seen) = pool.run(2, two_ranks, "fsdp2", str(tmp_path))
    assert seen == also_seen == 4 * (16 + 32)
    assert first["supervised_share"] == second["supervised_share"] == pytest.approx((16 + 16) / (16 + 32))
    assert first["peak_memory_gib"] == second["peak_memory_gib"]
    lines = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["data_wait"][1] >= 0.1 and len(line["cpu"]) == 2 and min(line["cpu"]) > 0 for line in lines)
    assert max(lines[-1]["peak_memory_gib"]) == pytest.approx(first["peak_memory_gib"])
    assert first["tokens_per_second"] == pytest.approx(2 * first["tokens_per_second_per_device"])


class Sleeps(Callback):
    """Rank 1 has something to do in every step that no other has."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        time.sleep(0.2 * (trainer.global_rank == 1))


def with_a_slow_rank(strategy: str, folder: str) -> dict[str, float]:
    throughput = Throughput()
    options = {**QUIET, "devices": 2, "max_steps": 20, "log_every_n_steps": 5, "default_root_dir": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_times, "LOOKS", 20)
        patch.setattr(stragglers, "HOLD", 0.0)
        trainer = Trainer(**options, strategy=strategy, callbacks=[throughput, Sleeps()])
        trainer.fit(CausalLMModule(tiny_model()), [[micro_batch()] for _ in range(20)])
    return throughput.last


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_a_slow_rank_is_named_once(strategy: str, pool: RankPool, tmp_path: Path) -> None:
    first, second = pool.run(2, with_a_slow_rank, strategy, str(tmp_path))
    assert first["slowest_rank"] == second["slowest_rank"] > 1.5
    lines = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert lines[-1]["stragglers"] == [{"rank": 1, "host": socket.gethostname()}]
    own, other = lines[-1]["own"][1], lines[-1]["own"][0]
    assert own > 0.1
    assert own > 1.5 * other
    said = [text for line in lines for text in line.get("said", ())]
    assert len(said) == 1
    assert re.match(rf"rank 1 \({socket.gethostname()}\) takes \d+\.\d × the median of all ranks: ", said[0])


def test_a_straggler_begins_and_ends() -> None:
    now = [0.0]
    judge = stragglers.Stragglers(now=lambda: now[0])

    def after(seconds: float, own: list[float], step: float = 1.0) -> list[int]:
        now[0] += seconds
        return judge.judge(own, step)

    assert after(0, [0.5, 0.5, 0.9, 0.5]) == []
    assert after(30, [0.5, 0.5, 0.5, 0.5]) == [], "for a moment only, as on a busy machine"
    assert after(1, [0.5, 0.5, 0.9, 0.5]) == []
    assert after(30, [0.5, 0.5, 0.9, 0.5]) == [2]
    assert after(30, [0.5, 0.5, 0.9, 0.5]) == [], "it is said once"
    assert after(30, [0.5, 0.5, 0.7, 0.5]) == []
    assert judge.named == {2}, "between the two limits it stays one"
    assert after(30, [0.5, 0.5, 0.5, 0.5]) == []
    assert not judge.named
    for _ in range(3):
        assert after(30, [0.01, 0.01, 0.02, 0.01]) == [], "too small a difference"
        assert after(30, [0.1, 0.1, 0.19, 0.1]) == [], "steps take longer for another reason"
    after(0, [0.5, 0.9])
    assert after(30, [0.5, 0.9]) == [1], "of two ranks the faster is the median"


def test_the_work_that_measures_a_device() -> None:
    probe = DeviceProbe(torch.device("cpu"), size=32)
    assert 0 < probe.measure() < 60
    assert probe.seconds() == 0.0, "on a CPU nothing is measured"


def test_a_peak_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="peak_flops=0"):
        Throughput(peak_flops=0)


def test_flops_of_layers_of_several_sizes() -> None:
    assert flops_per_token(tiny_model("gemma4_text"), 8) > 0


@pytest.mark.parametrize(("file", "waits"), [("of/torchft/manager.py", True), ("of/other.py", False)])
def test_who_waits_for_the_thread_of_a_collective_waits_for_ranks(file: str, waits: bool) -> None:
    """As replica groups do: the innermost frames are those of Python's threads."""
    found: dict[str, Any] = {}
    exec(compile("def wait(event):\n    event.wait()\n", file, "exec"), found)
    event = threading.Event()
    thread = threading.Thread(target=found["wait"], args=(event,))
    thread.start()
    files = [""]
    while not (files[0].endswith("threading.py") and file in files):
        time.sleep(0.01)
        frame = frame_of(thread.ident)  # type: ignore[arg-type]
        files = files_of(frame)
    assert waits_for_ranks(frame) is waits  # type: ignore[arg-type]
    event.set()
    thread.join()


def files_of(frame: Any) -> list[str]:
    """Of a stack, the innermost first."""
    return [] if frame is None else [frame.f_code.co_filename, *files_of(frame.f_back)]
