from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from automodel_trainer.data.sources import fingerprint, load_rows, load_validation_rows, open_stream

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def jsonl(path: Path, rows: list[dict] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_local_source_gives_the_same_rows(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict(train=dataset).save_to_disk(tmp_path / "saved_dict")
    jsonl(tmp_path / "folder" / "a.jsonl", ROWS[:2])
    jsonl(tmp_path / "folder" / "b.jsonl", ROWS[2:])
    sources = [jsonl(tmp_path / "rows.jsonl"), tmp_path / "rows.json", str(tmp_path / "rows.parquet")]
    sources += [tmp_path / "saved", tmp_path / "saved_dict", tmp_path / "folder", dataset, DatasetDict(train=dataset)]
    for source in [*sources, ROWS]:
        assert load_rows(source).to_list() == ROWS, source


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("line one\n\nline two\n")
    assert load_rows(tmp_path / "book.txt").to_list() == [{"text": "line one\n\nline two\n"}]


def test_splits_are_found_by_name(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        jsonl(tmp_path / "data" / f"{name}.jsonl", [{"split": name}])
    assert load_rows(tmp_path / "data").to_list() == [{"split": "train"}]
    validation = load_validation_rows(tmp_path / "data")
    assert validation is not None
    assert validation.to_list() == [{"split": "validation"}]
    assert load_rows(tmp_path / "data", "test").to_list() == [{"split": "test"}]


def test_a_test_split_is_no_validation() -> None:
    dataset = Dataset.from_list(ROWS)
    assert load_validation_rows(DatasetDict(train=dataset, test=dataset)) is None
    assert load_validation_rows(dataset) is None
    with pytest.raises(ValueError, match=r"no 'validation' split.*\['test', 'train'\]"):
        load_rows(DatasetDict(train=dataset, test=dataset), "validation")


def test_a_single_split_serves_as_any_that_is_asked_for() -> None:
    assert len(load_rows(DatasetDict(train=Dataset.from_list(ROWS)), "validation")) == 5


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/nowhere/at/all"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"no such file or folder: {name}.*Allowed: a .jsonl"):
        load_rows(name)


def test_broken_files_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        load_rows(empty)
    folder = tmp_path / "folder"
    jsonl(folder / "good.jsonl")
    (folder / "broken.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"broken\.jsonl line 2 is not valid JSON"):
        load_rows(folder)
    (tmp_path / "no.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"no\.parquet cannot be read"):
        load_rows(tmp_path / "no.parquet")
    (tmp_path / "data.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"data\.pkl is not data that can be read"):
        load_rows(tmp_path / "data.pkl")


def test_empty_and_odd_objects_are_refused() -> None:
    for empty in ([], Dataset.from_list([])):
        with pytest.raises(ValueError, match=r"empty|no rows"):
            load_rows(empty)
    with pytest.raises(ValueError, match="cannot read data from int"):
        load_rows(7)
    with pytest.raises(ValueError, match="streaming=True"):
        load_rows(Dataset.from_list(ROWS).to_iterable_dataset())


def test_a_hub_id_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/nothing is neither a local path nor"):
        load_rows("nobody/nothing")


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    same = [load_rows(jsonl(tmp_path / "a.jsonl")), load_rows(tmp_path / "saved"), dataset.select([0, 1, 2, 3, 4])]
    assert {fingerprint(rows) for rows in same} == {fingerprint(dataset)}
    shuffled = dataset.select([1, 0, 2, 3, 4])
    changed = Dataset.from_list([*ROWS[:4], {"prompt": "p4", "completion": "c5"}])
    assert len({fingerprint(rows) for rows in (dataset, shuffled, changed, dataset.select(range(4)))}) == 4


def test_streams_give_the_same_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl")
    jsonl(tmp_path / "folder" / "train.jsonl")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    streamed = load_dataset("json", data_files=str(path), streaming=True)
    for source in (path, tmp_path / "folder", tmp_path / "saved", ROWS, streamed, streamed["train"]):
        assert list(open_stream(source)) == ROWS
