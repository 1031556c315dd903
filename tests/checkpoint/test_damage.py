"""What has changed since it was written is refused by name, before anything is loaded; nothing in it is executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from automodel_trainer.checkpoint import check_checkpoint, load_checkpoint, save_checkpoint
from automodel_trainer.checkpoint.manifest import read_manifest, write_manifest
from automodel_trainer.checkpoint.record import entry_of
from automodel_trainer.checkpoint.runs import find_last
from tests.callbacks.runs import train
from tests.tiny import tiny_model

MUTATIONS = 100


def fresh(seed: int) -> tuple[Any, torch.optim.Optimizer]:
    model = tiny_model(seed=seed, hidden_size=16, intermediate_size=16, head_dim=4)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of one run, of two steps."""
    base = tmp_path_factory.mktemp("damage") / "checkpoints"
    model, optimizer = fresh(0)
    for step in (1, 2):
        model(input_ids=torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lightning = {"global_step": step, "loops": {}, "callbacks": {"step": step}}
        save_checkpoint(base / f"step-{step:08d}", lightning, model, [optimizer])
    return base


def flip(file: Path, draw: random.Random, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, draw: random.Random, other: Path) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def append(file: Path, draw: random.Random, other: Path) -> None:
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.randint(1, 100)))


def delete(file: Path, draw: random.Random, other: Path) -> None:
    file.unlink()


def swap(file: Path, draw: random.Random, other: Path) -> None:
    shutil.copyfile(other, file)


def mutate(folder: Path, other: Path, draw: random.Random) -> str:
    """Change one file in a random way; returns its path."""
    while True:
        name = draw.choice(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
        change: Callable[..., None] = draw.choice([flip, flip, truncate, append, delete, swap])
        if change is not swap or (folder / name).read_bytes() != (other / name).read_bytes():
            change(folder / name, draw, other / name)
            return name


def test_a_hundred_mutations_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    draw, files = random.Random(0), set()
    newest, older = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (2, 1))
    model, optimizer = fresh(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(MUTATIONS):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        shutil.copytree(run, tmp_path / "checkpoints")
        name = mutate(newest, older, draw)
        files.add(name)
        with pytest.raises(ValueError, match=name):
            load_checkpoint(newest, model, [optimizer])
        assert find_last(tmp_path / "checkpoints") == newest, f"{number}: the newest is not passed over in silence"
        with pytest.warns(UserWarning, match=f"Skipping a damaged checkpoint: .*{name}"):
            assert find_last(tmp_path / "checkpoints", whole=True) == older
    assert len(files) >= 8
    assert not optimizer.state
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items()), "nothing was loaded"
    load_checkpoint(run / "step-00000002", model, [optimizer])


def test_a_damaged_last_checkpoint_stops_a_run_and_last_whole_goes_back_to_the_one_before(tmp_path: Path) -> None:
    from automodel_trainer.callbacks import DCPCheckpoint

    options: dict[str, Any] = {"max_epochs": None, "limit_val_batches": 0, "scheduler": "constant"}
    whole = train(tmp_path, [DCPCheckpoint(every_n_steps=2)], max_steps=4, **options)
    shard = min((tmp_path / "checkpoints" / "latest" / "optimizer").glob("*.safetensors"))
    flip(shard, random.Random(0), shard)
    with pytest.raises(ValueError, match=rf"step-00000004/optimizer/{shard.name} is damaged.*last-whole"):
        train(tmp_path, max_steps=6, ckpt_path="last", **options)
    with pytest.warns(UserWarning, match=f"Skipping a damaged checkpoint.*{shard.name}"):
        again = train(tmp_path, max_steps=4, ckpt_path="last-whole", **options)
    assert again["journal"] == whole["journal"][2:]
    check_checkpoint(tmp_path / "checkpoints" / "latest")


class Planted:
    """Unpickled, it writes a file."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.evidence}",)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run / "step-00000002", tmp_path / "step-00000002"))


def forge(folder: Path) -> None:
    """A manifest of what is there, as somebody would write it who knows how."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "manifest.json"]
    write_manifest(folder, {p.relative_to(folder).as_posix(): entry_of(p) for p in files}, folder.name)


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "model/pytorch_model.bin",
        "model/adapter_model.bin",
        "model/model-00001-of-00001.safetensors",
        "optimizer/state.pt",
        "optimizer/extra.safetensors",
        "optimizer/groups.json",
        "trainer.json",
        "rank-00000.json",
        "evil.pkl",
    ],
)
def test_a_planted_pickle_is_refused_and_not_run(copy: Path, tmp_path: Path, name: str, forged: bool) -> None:
    evidence = tmp_path / "evidence"
    (copy / name).write_bytes(pickle.dumps(Planted(evidence)))
    if forged:
        forge(copy)
    with pytest.raises(ValueError, match=name.rpartition("/")[2]):
        load_checkpoint(copy, *_model_and_optimizer())
    assert not evidence.exists()


def _model_and_optimizer() -> tuple[Any, list[torch.optim.Optimizer]]:
    model, optimizer = fresh(1)
    return model, [optimizer]


@pytest.mark.parametrize("name", ["../step-00000001/trainer.json", "/etc/hostname", "model/../../x.json", "a\\b.json"])
def test_a_manifest_that_leaves_its_folder_is_refused(copy: Path, name: str) -> None:
    files = read_manifest(copy)["files"]
    write_manifest(copy, {**files, name: {"size": 1, "xxh3_128": "0" * 32}}, copy.name)
    with pytest.raises(ValueError, match="names files outside its folder"):
        check_checkpoint(copy)


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/tmp/outside.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(copy: Path, name: str) -> None:
    index = copy / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    forge(copy)
    with pytest.raises(ValueError, match="names files outside its folder"):
        load_checkpoint(copy, *_model_and_optimizer())


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], None], length: int | None = None) -> None:
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content[8 + size :])


def huge_offset(header: dict[str, Any]) -> None:
    sharding = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    sharding = {name: {"saved_offsets": [10**13] * len(at["saved_offsets"])} for name, at in sharding.items()}
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(sharding)


def huge_shape(header: dict[str, Any]) -> None:
    for name in header.keys() - {"__metadata__"}:
        header[name]["shape"] = [10**13]


def overlapping(header: dict[str, Any]) -> None:
    for name in header.keys() - {"__metadata__"}:
        header[name]["data_offsets"] = [0, header[name]["data_offsets"][1]]


def nothing(header: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.parametrize(
    ("change", "length"),
    [(huge_offset, None), (huge_shape, None), (overlapping, None), (nothing, 2**63), (nothing, 99_000_000)],
)
def test_sizes_in_headers_are_checked_before_memory_is_taken(
    copy: Path, part: str, change: Callable[[dict[str, Any]], None], length: int | None
) -> None:
    """Forged throughout: the manifest agrees with what is there. 10^13 elements would end the process."""
    file = min((copy / part).glob("*.safetensors"))
    if change is huge_offset and part == "model":
        return  # whole tensors have no offsets
    rewrite_header(file, change, length)
    forge(copy)
    with pytest.raises(ValueError, match=r"safetensors|optimizer is damaged"):
        load_checkpoint(copy, *_model_and_optimizer())
