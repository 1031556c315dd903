"""The readers, given anything: what was written comes back, all else is a ValueError, and nothing is executed."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from automodel_trainer.checkpoint import check_checkpoint, load_checkpoint, save_checkpoint
from automodel_trainer.checkpoint.codec import decode
from automodel_trainer.checkpoint.manifest import read_json, read_manifest
from automodel_trainer.models.files import check_safetensors, weight_files
from tests.checkpoint.test_damage import forge, fresh

TAGS = st.sampled_from(
    [
        "__float__",
        "__tuple__",
        "__set__",
        "__dict__",
        "__tensor__",
        "__path__",
        "__dtype__",
        "__device__",
        "dtype",
        "shape",
    ]
)
NAMES = st.sampled_from(
    ["float32", "load", "Tensor", "cpu", "cuda:99", "meta", "nan", "name", "files", "created", "size"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TAGS | NAMES | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
SLOW = settings(max_examples=60, suppress_health_check=list(HealthCheck))


@contextmanager
def refused_by_name(place: Path, other: str = "no other name") -> Iterator[None]:
    """Nothing is raised, or a ValueError that names the place (or the `other`)."""
    try:
        yield
    except ValueError as error:
        if str(place) not in str(error) and other not in str(error):
            raise AssertionError("the error does not say where") from error


@settings(max_examples=300)
@given(JSON)
@example({"__tensor__": [1], "dtype": "load", "shape": [1]})
@example({"__dtype__": "save"})
@example({"__tensor__": [1], "dtype": "float32", "shape": [10**13]})
@example({"__device__": "meta"})
def test_state_of_any_shape(value: Any) -> None:
    try:
        decoded = decode(value)
    except ValueError:
        return
    assert not callable(decoded), "no name out of a file becomes a function"


@SLOW
@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"\xff\xfe")
@example(b"9" * 5000)
def test_json_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content)
    with refused_by_name(file):
        json.dumps(read_json(file))


@SLOW
@given(
    length=st.integers(0, 2**64 - 1) | st.integers(0, 300),
    header=JSON | st.binary(max_size=99),
    data=st.binary(max_size=64),
)
@example(0, {"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}, b"")
@example(0, {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, b"")
@example(0, {"w": {"dtype": "F32", "shape": [1], "data_offsets": [60, 64]}}, b"1234")
def test_safetensors_of_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, length: int, header: Any, data: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", length or len(text)) + text + data)
    with refused_by_name(file):
        check_safetensors(file)


@SLOW
@given(JSON)
@example({"weight": None})
@example({"weight": "\0"})
def test_index_and_manifest_of_any_shape(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    for name, reader in (("manifest.json", read_manifest), ("manifest.json", check_checkpoint)):
        (folder / name).write_text(json.dumps(value))
        with pytest.raises(ValueError, match=str(folder)):
            reader(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    with refused_by_name(folder):
        assert weight_files(folder) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, optimizer = fresh(0)
    model(input_ids=torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss.backward()
    optimizer.step()
    folder = tmp_path_factory.mktemp("fuzz") / "step-00000001"
    save_checkpoint(folder, {"global_step": 1, "loops": {}}, model, [optimizer])
    return folder


@SLOW
@given(
    name=st.sampled_from(["trainer.json", "rank-00000.json", "optimizer/groups.json", "optimizer/packed.json"]),
    value=JSON,
)
@example("trainer.json", {"world_size": 1, "lightning": []})
@example("rank-00000.json", {"rng": {"python": 1, "numpy": 1, "torch": 1}, "loaders": None})
@example("rank-00000.json", {"rng": {}, "loaders": {}})
@example("optimizer/groups.json", [{"optimizer": "AdamW", "groups": [{"parameters": 1, "options": {}}]}])
@example("optimizer/packed.json", {"0.lm_head.weight/exp_avg": {"class": "os.system", "block_size": 2}})
@example(
    "optimizer/packed.json",
    {"0.lm_head.weight/exp_avg": {"class": "torchao.optim.CPUOffloadOptimizer", "block_size": 2}},
)
def test_a_forged_checkpoint_of_any_shape(whole: Path, name: str, value: Any) -> None:
    """The manifest agrees with what is there: whoever forges one can do that too."""
    folder = whole.parent / "forged" / whole.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / name).write_text(json.dumps(value))
    forge(folder)
    before = torch.get_rng_state()
    model, optimizer = fresh(1)
    with refused_by_name(folder, "torchao"):
        load_checkpoint(folder, model, [optimizer])
    torch.set_rng_state(before)
