from __future__ import annotations

import gc
import json
import multiprocessing
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from automodel_trainer.data.batches import collate_packed
from automodel_trainer.data.loader import MicroBatchLoader
from automodel_trainer.data.mock import MockDataModule
from automodel_trainer.data.rows import RandomRows, Rows, RowStats
from automodel_trainer.nn.constants import IGNORE_INDEX

SIZE = 8


class UnevenRows(RandomRows):
    """Random rows of different lengths."""

    def __init__(self, count: int, width: int = 40) -> None:
        super().__init__(count, width, 250, seed=0)
        self.lengths = np.random.default_rng(5).integers(3, width + 1, count)
        self.stats = RowStats(count, count, int(self.lengths.sum()), int(self.lengths.sum()), count * width)

    def fetch(self, rows: Any) -> list:
        full = super().fetch(rows)
        return [
            [d._replace(input_ids=d.input_ids[:n], trained=d.trained[:n]) for d in documents]
            for documents, n in zip(full, self.lengths[rows])
        ]


def loader(rows: Rows | None = None, **options: Any) -> MicroBatchLoader:
    defaults: dict[str, Any] = {"micro_batch_size": 1, "global_batch_size": SIZE}
    return MicroBatchLoader(rows or RandomRows(43, 16, 250, seed=0), **{**defaults, **options})


def ids(step: list[dict]) -> list[int]:
    return [i for batch in step for i in batch["sample_ids"]]


def epochs(of: MicroBatchLoader, count: int) -> list[list[int]]:
    return [ids(step) for _ in range(count) for step in of]


def test_the_largest_steps() -> None:
    """Padded: the longest rows, twice where gradients accumulate. The place in the data stays."""
    rows = UnevenRows(43)
    padded = loader(rows, packed=False, micro_batch_size=2)
    (step,) = padded.largest_steps()
    assert len(step) == 2
    assert step[0]["lengths"].tolist() == sorted(rows.lengths)[:-3:-1]
    assert step[0]["input_ids"].shape == (
        2,
        max(batch["input_ids"].shape[1] for batches in padded for batch in batches),
    )
    assert not padded.has_one_width
    assert epochs(padded, 1) == epochs(loader(rows, packed=False, micro_batch_size=2), 2)[6:]


def test_the_largest_packed_steps() -> None:
    """A row of one document, and one of several: attention has other ways for them."""

    class SplitRows(RandomRows):
        def fetch(self, rows: Any) -> list:
            found = super().fetch(rows)
            return [cut(documents[0]) if row % 4 == 3 else documents for row, documents in zip(rows, found)]

    def cut(d: Any) -> list:
        parts = (slice(5), slice(5, 16))
        return [d._replace(input_ids=d.input_ids[part], trained=d.trained[part]) for part in parts]

    alone, several = loader(SplitRows(43, 16, 250, seed=0), global_batch_size=1).largest_steps()
    assert [batch["document_lengths"] for batch in (*alone, *several)] == [[[16]], [[5, 11]]]
    assert len(loader().largest_steps()) == 1


def test_a_batch_that_is_dealt_late_has_the_same_rows_for_any_number_of_ranks() -> None:
    whole = [ids(step) for step in loader(UnevenRows(43), packed=False)]
    late = loader(UnevenRows(43), packed=False, deals_late=True, micro_batch_size=2, dp_size=2)
    for number, (batch, rows) in enumerate(zip(late, whole, strict=True)):
        assert batch == []
        for ranks in (1, 2, 3, 5):
            dealt: list[int] = []
            for rank in range(ranks):
                batch.deal(rank, ranks)
                assert len(batch) == -(-SIZE // (2 * ranks)), "ranks wait for each other after each micro-batch"
                dealt += ids(batch)
            assert sorted(dealt) == sorted(rows)
        with late.last_not_taken():
            before = late.state_dict()
        again = loader(UnevenRows(43), packed=False)
        again.load_state_dict(before)
        assert ids(next(iter(again))) == rows, number


def test_an_epoch_has_every_row_once_and_the_next_one_another_order() -> None:
    steps = loader()
    first, second = ([i for step in steps for i in ids(step)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(43))
    assert first != second
    assert len(steps) == 6 == len(list(steps))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_layout(packed: bool, dp_size: int, micro_batch_size: int) -> None:
    if dp_size * micro_batch_size > SIZE:
        pytest.skip("more rows at once than a global batch has")
    rows = UnevenRows(43) if not packed else None
    reference = [Counter(step) for step in epochs(loader(rows, packed=packed), 2)]
    ranks = [
        loader(rows, packed=packed, dp_size=dp_size, dp_rank=rank, micro_batch_size=micro_batch_size)
        for rank in range(dp_size)
    ]
    for _ in range(2):
        for steps in zip(*ranks, strict=True):
            assert Counter(i for step in steps for i in ids(step)) == reference.pop(0)
            shapes = {tuple(batch["input_ids"].shape) for step in steps for batch in step}
            assert len(shapes) == 1
            assert next(iter(shapes))[0] == micro_batch_size
            assert [len(step) for step in steps] == [SIZE // dp_size // micro_batch_size] * dp_size
    assert not reference


class PicturedRows(RandomRows):
    """Random rows, two of three with pictures of many sizes."""

    def __init__(self, count: int = 64) -> None:
        super().__init__(count, 16, 250, seed=0)
        tokens = np.random.default_rng(3).integers(1, 5000, count)
        self.picture_tokens = np.where(np.arange(count) % 3 == 0, 0, tokens)
        self.kinds = {"picture": self.picture_tokens > 0}


def without_blanks(*args: Any, lacks: Sequence[str] = ()) -> Any:
    return collate_packed(*args)


@pytest.mark.parametrize("dp_size", [2, 4])
def test_ranks_have_about_as_many_tokens_of_pictures_in_each_micro_batch(dp_size: int) -> None:
    """And the rows of a global batch stay the same."""
    rows = PicturedRows()
    ranks = [loader(rows, dp_rank=rank, dp_size=dp_size, collate=without_blanks) for rank in range(dp_size)]
    plain = loader(RandomRows(len(rows), 16, 250, seed=0)).global_batches(0)
    evened, order = ranks[0].global_batches(0), loader(rows).global_batches(0)
    assert [set(batch) for batch in evened] == [set(batch) for batch in plain]
    assert np.array_equal(evened, order)  # on any number of ranks
    waited = {"evened": 0, "plain": 0}
    for name, batches in (("evened", evened), ("plain", plain)):
        together = rows.picture_tokens[batches].reshape(-1, dp_size)  # what ranks do at a time
        waited[name] = int((together.max(1, keepdims=True) - together).sum())
    assert waited["evened"] < waited["plain"] / 2
    for batch, *steps in zip(evened, *ranks):
        dealt = [[i for micro in step for i in micro["sample_ids"]] for step in steps]
        assert dealt == [batch[rank::dp_size].tolist() for rank in range(dp_size)]


@pytest.mark.parametrize("always", [False, True])
def test_a_rank_lacks_the_kinds_that_another_rank_has(always: bool) -> None:
    """Of micro-batches without any kind, pictures are lacking where the layout needs every gradient."""
    rows = PicturedRows()
    numbers = np.arange(len(rows))
    rows.kinds = {"picture": numbers % 5 == 0, "video": numbers % 7 == 0}

    def lacks_of(*args: Any, lacks: Sequence[str] = ()) -> Any:
        return {"ids": [document.sample_id for row in args[0] for document in row], "lacks": list(lacks)}

    options: dict[str, Any] = {"collate": lacks_of, "always_pictures": always, "micro_batch_size": 2, "dp_size": 2}
    ranks = [list(loader(rows, dp_rank=rank, **options)) for rank in range(2)]
    seen = set()
    for parts in ((left, right) for steps in zip(*ranks) for left, right in zip(*steps)):
        has = [{kind for kind, of in rows.kinds.items() if of[part["ids"]].any()} for part in parts]
        wanted = has[0] | has[1] or ({"picture"} if always else set())
        for own, part in zip(has, parts):
            assert set(part["lacks"]) == wanted - own
            seen.add(tuple(part["lacks"]))
    assert {(), ("picture",), ("video",)} <= seen


def test_rows_with_as_many_tokens_of_pictures_keep_their_order() -> None:
    rows = PicturedRows(43)
    rows.picture_tokens = np.full(43, 7)
    assert np.array_equal(loader(rows).global_batches(1), loader().global_batches(1))


def test_padded_steps_are_as_wide_as_the_longest_row_of_the_global_batch() -> None:
    rows = UnevenRows(43)
    for step in loader(rows, packed=False, micro_batch_size=2):
        longest = max(int(rows.lengths[i]) for i in ids(step))
        assert {batch["input_ids"].shape[1] for batch in step} == {-(-longest // 8) * 8}


def test_a_short_last_batch_is_filled_without_labels_or_dropped() -> None:
    last = list(loader())[-1]
    assert len(last) == SIZE
    assert len(ids(last)) == 43 % SIZE
    assert sum(bool((batch["labels"] != IGNORE_INDEX).any()) for batch in last) == 43 % SIZE
    assert len(loader(drop_last=True)) == 5 == len(list(loader(drop_last=True)))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 6, 7])
def test_resuming_goes_on_with_the_very_next_batch(stop: int, num_workers: int) -> None:
    options: dict[str, Any] = {"num_workers": num_workers, "seed": 3}
    reference = epochs(loader(seed=3), 3)
    interrupted = loader(**options)
    iterator = iter(interrupted)
    for _ in range(stop):
        try:
            next(iterator)
        except StopIteration:
            iterator = iter(interrupted)
            next(iterator)
    state = json.loads(json.dumps(interrupted.state_dict()))

    resumed = loader(**options)
    resumed.load_state_dict(state)
    iter(resumed)  # a look at the iterator takes nothing from it
    rest = epochs(resumed, 3 - stop // 6)
    assert rest == reference[stop:]


def test_an_abandoned_epoch_is_over() -> None:
    steps = loader()
    reference = epochs(loader(), 2)
    next(iter(steps))
    assert [ids(step) for step in steps] == reference[6:]


def test_a_position_in_other_data_is_refused() -> None:
    state = loader().state_dict()
    with pytest.raises(ValueError, match="data changed"):
        loader(RandomRows(44, 16, 250, seed=0)).load_state_dict(state)


def test_another_global_batch_size_within_an_epoch_and_after_it() -> None:
    """Within an epoch the rows that are left come in the old order; its length counts what was done."""
    steps = loader()
    iterator = iter(steps)
    next(iterator)
    other = loader(global_batch_size=4, seed=99)
    other.load_state_dict(steps.state_dict())
    assert other.batches_yielded == 2
    assert len(other) == 11
    rest = [i for step in iterator for i in ids(step)]
    assert [i for step in other for i in ids(step)] == rest
    assert sorted(i for step in other for i in ids(step)) == list(range(43)), "the next epoch is whole"
    other = loader(global_batch_size=4)
    other.load_state_dict(steps.state_dict())
    assert [i for step in other for i in ids(step)] == [i for step in epochs(loader(), 2)[6:] for i in step]


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(loader())
    assert torch.equal(before, torch.get_rng_state())


class Recorder(pl.LightningModule):
    """Remembers the sample ids of every step it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.automatic_optimization = False
        self.seen: list[list[int]] = []

    def training_step(self, batch: list[dict], batch_idx: int) -> None:
        self.seen.append(ids(batch))
        self.optimizers().step()

    def validation_step(self, batch: list[dict], batch_idx: int) -> None:
        assert isinstance(batch, list)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(Callback):
    """A checkpoint at every place where one can be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: list[tuple[Path, int]] = []

    def save(self, trainer: pl.Trainer, module: Recorder, where: str) -> None:
        if trainer.sanity_checking:
            return
        path = self.folder / f"{where}-{len(module.seen)}.ckpt"
        trainer.save_checkpoint(path)
        self.taken.append((path, len(module.seen)))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self.save(trainer, module, "batch")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.save(trainer, module, "epoch")

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.save(trainer, module, "validation")


def fit(folder: Path, *callbacks: Callback, resume: Path | None = None, workers: int = 0, **options: Any) -> list:
    data = MockDataModule(
        vocab_size=50, seq_len=8, num_samples=11, val_samples=2, global_batch_size=4, num_workers=workers
    )
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=False if resume else None)
    return module.seen


@pytest.mark.parametrize(
    "options",
    [{}, {"limit_train_batches": 2}, {"limit_train_batches": 0.7}, {"val_check_interval": 2}, {"limit_val_batches": 0}],
    ids=["plain", "limit", "fraction", "validation-inside", "no-validation"],
)
def test_lightning_resumes_exactly_from_every_checkpoint(tmp_path: Path, options: dict) -> None:
    saves = SaveEverywhere(tmp_path)
    seen = fit(tmp_path, saves, **options)
    per_epoch = 2 if "limit_train_batches" in options else 3
    assert len(seen) == 3 * per_epoch
    if per_epoch == 3:
        for epoch in range(3):
            assert sorted(i for step in seen[3 * epoch : 3 * epoch + 3] for i in step) == list(range(11))
    assert len({str(step) for step in seen}) == len(seen)
    for path, done in saves.taken:
        assert fit(tmp_path, resume=path, **options) == seen[done:], path.name


def test_lightning_resumes_exactly_with_workers(tmp_path: Path) -> None:
    saves = SaveEverywhere(tmp_path)
    seen = fit(tmp_path, saves, workers=1)
    path, done = saves.taken[3]
    assert fit(tmp_path, resume=path, workers=1) == seen[done:]


class WorkersAtTheEnd(Callback):
    """Those of the loaders for training and for validation, while both have them."""

    def __init__(self) -> None:
        self.workers: list[Any] = []

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.workers = multiprocessing.active_children()


def test_workers_end_with_the_run(tmp_path: Path) -> None:
    """Not when the garbage collector finds them, in the middle of something else, and then waits for each of them."""
    before = set(multiprocessing.active_children())
    end = WorkersAtTheEnd()
    fit(tmp_path, end, workers=1)
    mine = set(end.workers) - before
    assert len(mine) == 2, "one for training, one for validation"
    assert not [worker for worker in mine if worker.is_alive()]


@pytest.mark.parametrize("taken", [1, 6])
def test_workers_end_with_their_loader(taken: int) -> None:
    before = set(multiprocessing.active_children())
    steps = loader(num_workers=2)
    iterator = iter(steps)
    for _ in range(taken):
        next(iterator)
    mine = set(multiprocessing.active_children()) - before
    assert len(mine) == 2
    gone = weakref.ref(steps)
    gc.disable()
    try:
        del steps, iterator
        assert gone() is None, "nothing refers to it"
    finally:
        gc.enable()
    assert not [worker for worker in mine if worker.is_alive()]


def test_torch_loaders_are_not_touched_by_lightning() -> None:
    assert not isinstance(loader(), DataLoader)  # Lightning would put a sampler of its own into one
