"""A run goes on in the middle of an epoch of a user's own DataLoader: each row is seen once, or it is said."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from automodel_trainer.callbacks import DCPCheckpoint
from tests.lightning.boring import make
from tests.pool import RankPool

COUNT = 12
ROWS = torch.arange(float(COUNT)).repeat(32, 1).T.contiguous()  # row i is all i


class Seen(BoringModel):
    """Notes its rows. It draws random numbers, as dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.rows.append([int(row) for row in batch[:, 0]])
        return super().training_step(batch + torch.rand(()) + random.random(), batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class Eager:
    """A batch sampler that draws its order when it is asked for an iterator."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(COUNT).tolist()
        return iter([order[i : i + 2] for i in range(0, COUNT, 2)])

    def __len__(self) -> int:
        return COUNT // 2


class Lazy(Eager):
    """One whose draws lie between those of training: its order cannot be had again."""

    def __iter__(self) -> Iterator[list[int]]:
        return ([random.randrange(COUNT), random.randrange(COUNT)] for _ in range(COUNT // 2))


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(ROWS)

    def __len__(self) -> int:
        return COUNT


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


LOADERS = {
    "in order": lambda: DataLoader(ROWS, batch_size=2),  # type: ignore[arg-type]
    "shuffled": lambda: DataLoader(ROWS, batch_size=2, shuffle=True),  # type: ignore[arg-type]
    "workers": lambda: DataLoader(ROWS, batch_size=2, shuffle=True, num_workers=1),  # type: ignore[arg-type]
    "own generator": lambda: DataLoader(ROWS, batch_size=2, shuffle=True, generator=generator()),  # type: ignore
    "with replacement": lambda: DataLoader(ROWS, batch_size=2, sampler=RandomSampler(ROWS, True, 12)),  # type: ignore
    "weighted": lambda: DataLoader(ROWS, batch_size=2, sampler=WeightedRandomSampler([1.0] * 12, 12)),  # type: ignore
    "subset": lambda: DataLoader(ROWS, batch_size=2, sampler=SubsetRandomSampler(range(COUNT))),  # type: ignore
    "eager": lambda: DataLoader(ROWS, batch_sampler=Eager()),  # type: ignore[arg-type]
    "no batches": lambda: DataLoader(ROWS[:, None], batch_size=None, sampler=RandomSampler(range(6))),  # type: ignore
    "a list": lambda: list(ROWS.split(2)),
}


def run(root: Path, loader: Any, *, epochs: int = 3, **fit: Any) -> tuple[list[list[int]], Any]:
    """Three epochs of six steps; saved after step 9 and between epochs, after step 12."""
    torch.manual_seed(3)
    random.seed(3)
    saves = DCPCheckpoint(every_n_steps=9, every_n_epochs=2, keep_last=None, save_at_end=False)
    options = {"limit_train_batches": 1.0, "limit_val_batches": 0, "callbacks": [saves], "max_epochs": epochs}
    make(root, **options).fit(module := Seen(), loader, **fit)
    return module.rows, saves.run_folder


@pytest.mark.parametrize("name", LOADERS)
def test_it_goes_on_with_the_next_batch(tmp_path: Path, name: str) -> None:
    whole, folder = run(tmp_path, LOADERS[name]())
    given = LOADERS[name]()
    before = dict(vars(given)) if isinstance(given, DataLoader) else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(epoch anew|not resumable)")
        rest, _ = run(tmp_path, given, ckpt_path=folder / "step-00000009")
        between, _ = run(tmp_path, LOADERS[name](), ckpt_path=folder / "step-00000012")
    assert rest == whole[9:]
    assert between == whole[12:]
    if isinstance(given, DataLoader):
        kept = {key: value for key, value in vars(given).items() if not key.startswith("_")}
        kept.pop("worker_init_fn")  # Lightning sets it after seed_everything(workers=True), in other tests perhaps
        assert all(value is before[key] for key, value in kept.items()), "the user's loader is as it was"


class Own(Dataset):
    """A data set of a class that nobody knows: its rows are not looked into."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return ROWS[index]


def own_rows(count: int) -> DataLoader:
    return DataLoader(Own(count), batch_size=2, shuffle=True)


def test_what_cannot_go_on_is_said(tmp_path: Path) -> None:
    cases: dict[str, tuple[Any, Any, str]] = {
        "lazy": (DataLoader(ROWS, batch_sampler=Lazy()), None, "another order than then"),  # type: ignore[arg-type]
        "stream": (DataLoader(Endless(), batch_size=2), None, "an IterableDataset does not know its place"),
        "shorter": (own_rows(COUNT), own_rows(10), "its length"),
        "other seed": (LOADERS["own generator"](), LOADERS["shuffled"](), "another order|does not hold"),
        "two": ([LOADERS["shuffled"](), LOADERS["shuffled"]()], None, "there are 2 loaders"),
    }
    for name, (loader, other, message) in cases.items():

        class Either(Seen):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return super().training_step(batch[0] if isinstance(batch, list) else batch, batch_idx)

        root = tmp_path / name
        saves = DCPCheckpoint(every_n_steps=4, keep_last=None, save_at_end=False)
        options: dict[str, Any] = {"limit_train_batches": 1.0, "limit_val_batches": 0}
        make(root, **options, callbacks=[saves]).fit(Either(), loader)
        path = saves.last_model_path
        with pytest.warns(UserWarning, match=rf"begins the epoch anew.*(?s:.*)|{message}") as caught:
            make(root, **options).fit(module := Either(), other or loader, ckpt_path=path)
        said = [str(w.message) for w in caught if "begins the epoch anew" in str(w.message)]
        assert len(said) == 1, (name, said)
        assert any(part in said[0] for part in message.split("|")), (name, said)
        assert len(module.rows) in (1, 2)


def on_two_ranks(root: str, path: str | None, epochs: int, size: int) -> list[list[int]]:
    torch.manual_seed(3)
    saves = DCPCheckpoint(every_n_steps=2, keep_last=None, save_at_end=False)
    options = {"limit_train_batches": 1.0, "limit_val_batches": 0, "callbacks": [saves], "devices": "auto"}
    module = Seen()
    loader = DataLoader(ROWS, batch_size=size, shuffle=True)  # type: ignore[arg-type]
    make(root, **options, max_epochs=epochs, strategy="ddp").fit(module, loader, ckpt_path=path)
    return module.rows


def test_each_rank_goes_on_with_its_share(pool: RankPool, tmp_path: Path) -> None:
    whole = pool.run(2, on_two_ranks, str(tmp_path), None, 2, 2)
    path = str(tmp_path / "checkpoints" / "step-00000004")
    rest = pool.run(2, on_two_ranks, str(tmp_path / "b"), path, 2, 2)
    assert rest == [rows[4:] for rows in whole]


def test_lightnings_callback_too(tmp_path: Path) -> None:
    saves = ModelCheckpoint(dirpath=tmp_path / "theirs", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    options = {"limit_train_batches": 1.0, "limit_val_batches": 0}
    make(tmp_path, **options, callbacks=[saves]).fit(whole := Seen(), LOADERS["own generator"]())
    path = tmp_path / "theirs" / "step=4.ckpt"
    make(tmp_path, **options).fit(rest := Seen(), LOADERS["own generator"](), ckpt_path=path)
    assert rest.rows == whole.rows[4:]
    trainer = make(tmp_path, **options)
    trainer.ckpt_path = path
    trainer.fit(rest := Seen(), LOADERS["own generator"]())
    assert rest.rows == whole.rows[4:]
    assert trainer.resumed_path == str(path)
