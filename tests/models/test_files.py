from __future__ import annotations

import json
from pathlib import Path

import pytest

from automodel_trainer.models.files import check_safetensors, resolve_folder, weight_files
from tests.tiny import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


def test_whole_folder(folder: Path) -> None:
    files = weight_files(folder)
    assert len(files) > 1
    assert all(file.suffix == ".safetensors" for file in files)


def test_no_weights_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"neither model.safetensors .* pytorch_model.bin, which are not read"):
        weight_files(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40, 0.5, 0.99])
def test_truncated_file_is_named(folder: Path, keep: float) -> None:
    victim = weight_files(folder)[1]
    data = victim.read_bytes()
    victim.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(ValueError, match=victim.name):
        weight_files(folder)


def test_corrupt_header_is_named(folder: Path) -> None:
    victim = weight_files(folder)[0]
    data = bytearray(victim.read_bytes())
    data[8:12] = b"\xff\x00{]"
    victim.write_bytes(data)
    with pytest.raises(ValueError, match=victim.name):
        check_safetensors(victim)


def test_huge_header_takes_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="truncated"):
        check_safetensors(file)


def test_missing_shard_is_named(folder: Path) -> None:
    victim = weight_files(folder)[-1]
    victim.unlink()
    with pytest.raises(ValueError, match=f"{victim.name} is missing"):
        weight_files(folder)


def test_index_must_stay_in_its_folder(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../../etc/model.safetensors")
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="outside its folder"):
        weight_files(folder)


def test_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder here nor a Hub repository"):
        resolve_folder(str(tmp_path / "nothing"))
