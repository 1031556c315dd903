"""Checkpoints in an S3-compatible store on this machine: whole or not at all there too."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import fsspec
import pytest

from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.checkpoint.remote import RemoteRuns, fetch
from tests.callbacks.runs import train
from tests.pool import RankPool


def there(url: str) -> list[str]:
    fs, root = fsspec.url_to_fs(url, skip_instance_cache=True)
    return sorted(path.rpartition("/")[2] for path in fs.ls(root, refresh=True, detail=False))


def saver(url: str, **options: Any) -> DCPCheckpoint:
    return DCPCheckpoint(url, **{"every_n_steps": 2, "keep_last": 2, **options})


SHORT: dict[str, Any] = {"max_epochs": None, "limit_val_batches": 0, "scheduler": "constant"}


def halves(root: Path, bucket: str, devices: int, background: bool, environment: dict[str, str]) -> list[str]:
    """Half a run; then the rest of it on a machine that has nothing but the store. Returns what is wrong."""
    os.environ.update(environment)
    options = {**SHORT, "devices": devices, "strategy": "fsdp2" if devices > 1 else "auto"}
    whole = train(root / "whole", max_steps=8, **options)
    train(root / "first", [saver(f"{bucket}/run", async_save=background)], max_steps=4, **options)
    rest = train(
        root / "second", [saver(f"{bucket}/run", async_save=background)], max_steps=8, ckpt_path="last", **options
    )
    return [] if rest["journal"] == whole["journal"][4:] else [f"{rest['journal']} is not {whole['journal'][4:]}"]


@pytest.mark.parametrize(("devices", "background"), [(1, False), (2, True)], ids=["sync", "async-2"])
def test_a_run_goes_on_from_the_store(
    pool: RankPool, tmp_path: Path, bucket: str, server: dict[str, str], devices: int, background: bool
) -> None:
    assert pool.run(devices, halves, tmp_path, bucket, devices, background, server) == [[]] * devices
    assert there(f"{bucket}/run") == ["latest", "step-00000006", "step-00000008"]
    assert RemoteRuns(f"{bucket}/run").target("latest") == ("", "step-00000008")
    again = train(tmp_path / "third", max_steps=8, ckpt_path=f"{bucket}/run/step-00000006", **SHORT)
    assert [entry[1] for entry in again["journal"]] == [7, 8]


def test_without_its_manifest_it_is_none(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails, or a process that dies, while files are uploaded; the next save clears away what is left."""
    commit = RemoteRuns.commit

    def failing(self: RemoteRuns, folder: Path, run: str) -> None:
        if folder.name == "step-00000004":
            raise OSError("connection reset")
        commit(self, folder, run)

    monkeypatch.setattr(RemoteRuns, "commit", failing)
    callback = saver(f"{bucket}/run", save_at_end=False)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train(tmp_path / "a", [callback], max_steps=5, **SHORT)
    assert callback.failed_saves == 1
    text = "\n".join(str(w.message) for w in warned)
    assert re.search(r"step 4 could not be written: .*s3://.*connection reset", text), text
    assert there(f"{bucket}/run") == ["latest", "step-00000002", "step-00000004"]
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        fetch(f"{bucket}/run/step-00000004", tmp_path)
    shutil.rmtree(tmp_path / "a")
    last = saver(f"{bucket}/run").find_last(tmp_path / "a")
    assert last == tmp_path / "a" / "checkpoints" / "step-00000002"
    train(tmp_path / "a", [saver(f"{bucket}/run", keep_last=1)], max_steps=6, ckpt_path="last", **SHORT)
    assert there(f"{bucket}/run") == ["latest", "step-00000006"]


def test_damage_is_refused_and_last_whole_goes_back(tmp_path: Path, bucket: str) -> None:
    train(tmp_path / "a", [saver(f"{bucket}/run")], max_steps=4, **SHORT)
    fs, root = fsspec.url_to_fs(f"{bucket}/run", skip_instance_cache=True)
    fs.pipe_file(f"{root}/step-00000004/trainer.json", b"{}")
    with pytest.raises(ValueError, match=r"trainer.json is damaged"):
        train(tmp_path / "b", [saver(f"{bucket}/run")], max_steps=6, ckpt_path="last", **SHORT)
    with pytest.warns(UserWarning, match=r"Skipping a damaged checkpoint: s3://.*step-00000004.*trainer.json"):
        found = saver(f"{bucket}/run").find_last(tmp_path / "c", whole=True)
    assert found == tmp_path / "c" / "checkpoints" / "step-00000002"


def test_a_new_run_does_not_touch_an_older_one_and_best_is_found(tmp_path: Path, bucket: str) -> None:
    for root in ("a", "b"):
        callback = saver(f"{bucket}/run", monitor="val_loss", keep_last=1)
        train(tmp_path / root, [callback], max_steps=4, max_epochs=None, val_check_interval=2)
    assert there(bucket) == ["run", "run-v1"]
    best = saver(f"{bucket}/run", monitor="val_loss").find_best(tmp_path / "c")
    assert best == tmp_path / "c" / "checkpoints-v1" / Path(callback.best_model_path).name


def test_an_unknown_store_is_refused() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        DCPCheckpoint("nosuch://bucket/run")
