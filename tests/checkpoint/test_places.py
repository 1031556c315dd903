"""Nodes whose folders are not shared, with checkpoints in object storage."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from automodel_trainer.callbacks.dcp_checkpoint import DCPCheckpoint
from automodel_trainer.checkpoint import CheckpointError, check_checkpoint, save_checkpoint, weights
from automodel_trainer.checkpoint.remote import RemoteRuns, fetch, mirror
from automodel_trainer.checkpoint.runs import find_last
from tests.callbacks.runs import train
from tests.checkpoint.test_remote import SHORT, there
from tests.checkpoint.test_state import LIGHTNING, build, load, step
from tests.pool import RankPool
from tests.processes import Job

CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_BIND = 0x00020000, 0x4000, 1 << 18, 0x1000


def own_disk(folder: Path, disks: Path) -> None:
    """Give this process a disk of its own at `folder`, in a mount namespace. Root on Linux can."""
    libc = ctypes.CDLL(None, use_errno=True)
    disk = disks / os.environ["RANK"]
    disk.mkdir(parents=True, exist_ok=True)
    done = libc.unshare(CLONE_NEWNS) == 0
    done = done and libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
    if not done or libc.mount(str(disk).encode(), str(folder).encode(), None, MS_BIND, None):
        raise OSError(ctypes.get_errno(), "no mount namespace")


def run(root: Path, bucket: str, steps: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    own_disk(root / "here", root / "disks")
    saver = DCPCheckpoint(every_n_steps=2, keep_last=2, async_save=steps > 4)
    options: dict[str, Any] = {**SHORT, "devices": 2, "strategy": "fsdp2", "attention_dropout": 0.0}
    os.environ["AMT_CACHE"] = str(root / "here" / "cache")
    trained = train(f"{bucket}/run", [saver], max_steps=steps, ckpt_path="auto", **options)  # type: ignore[arg-type]
    assert saver.failed_saves == 0
    (root / f"journal-{os.environ['RANK']}.json").write_text(json.dumps(trained["journal"]))


def save_in_parts(root: Path, url: str, environment: dict[str, str], fails: bool) -> tuple[str, list[str]]:
    """Ranks 0 and 1 share a folder, and rank 2 has another. Returns the error, and the files that stay."""
    os.environ.update(environment)
    model, optimizer = build("fsdp2", 3, seed=1)
    folder = root / ("b" if dist.get_rank() == 2 else "a") / "step-00000001"
    step(model, optimizer)
    error = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "MIN_FILE_BYTES", 1 << 12)
        if fails and dist.get_rank() == 2:
            patch.setattr(RemoteRuns, "upload", refuse)
        try:
            save_checkpoint(folder, LIGHTNING, model, [optimizer], mirror=partial(mirror, RemoteRuns(url), ""))
        except CheckpointError as raised:
            error = str(raised)
    dist.barrier()
    return error, sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def refuse(self: RemoteRuns, *args: Any) -> None:
    raise OSError("connection reset")


def test_every_rank_uploads_what_its_disk_has(
    pool: RankPool, tmp_path: Path, bucket: str, server: dict[str, str]
) -> None:
    for error, files in pool.run(3, save_in_parts, tmp_path / "nodes", f"{bucket}/run", server, False):
        assert (error, files) == ("", ["a/step-00000001/manifest.json"])
    here = tmp_path / "nodes" / "a" / "step-00000001"
    with pytest.raises(ValueError, match=r"has only its manifest.json: .* object storage"):
        check_checkpoint(here)
    assert find_last(here.parent, whole=True) is None
    whole = fetch(f"{bucket}/run/step-00000001", tmp_path)
    check_checkpoint(whole)
    assert {"rank-00002.json", "rank-00001.json", "trainer.json"} <= {path.name for path in whole.iterdir()}
    loaded = pool.run(2, load, "fsdp2", 2, whole)
    assert loaded[0]["states"]


def test_a_store_that_fails_leaves_nothing(pool: RankPool, tmp_path: Path, bucket: str, server: dict[str, str]) -> None:
    for error, files in pool.run(3, save_in_parts, tmp_path, f"{bucket}/run", server, True):
        assert "connection reset (on rank 2)" in error
        assert files == []
    assert not RemoteRuns(f"{bucket}/run").newest()


@pytest.mark.matrix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts need root")
def test_nodes_without_a_shared_folder(tmp_path: Path, bucket: str, server: dict[str, str]) -> None:
    """The second half saves in the background, and on one of the two the disk is new."""
    (tmp_path / "here").mkdir()
    whole = train(tmp_path / "whole", max_steps=8, attention_dropout=0.0, **SHORT)["journal"]

    def go(steps: int) -> list[Any]:
        job = Job(tmp_path / "log", run, tmp_path, bucket, steps, server, world_size=2)
        codes = job.wait(300)
        if "no mount namespace" in job.log():
            pytest.skip("this machine makes no mount namespaces")
        assert codes == [0, 0], job.log() + job.log(1)
        return json.loads((tmp_path / "journal-0.json").read_text())

    first = go(4)
    assert there(f"{bucket}/run/checkpoints") == ["latest", "step-00000002", "step-00000004"]
    kept = sorted((tmp_path / "disks").rglob("*.safetensors"))
    assert not kept, "a part of a checkpoint is of no use"
    shutil.rmtree(tmp_path / "disks" / "1")  # another machine
    rest = go(8)
    assert there(f"{bucket}/run/checkpoints") == ["latest", "step-00000006", "step-00000008"]
    found = {entry[1]: entry[3] for entry in first + rest}
    assert found == pytest.approx({entry[1]: entry[3] for entry in whole}, rel=1e-4)
    again = train(tmp_path / "again", max_steps=8, ckpt_path=f"{bucket}/run/checkpoints/step-00000006", **SHORT)
    assert [entry[1] for entry in again["journal"]] == [7, 8]
