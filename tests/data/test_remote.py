"""Data in object storage: an S3-compatible store on this machine."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import fsspec
import pytest

from automodel_trainer import TextDataModule
from automodel_trainer.data.sources import load_rows
from tests.tiny import tiny_tokenizer

TEXTS = [f"document {i} " + "word " * (i % 7) for i in range(30)]


def test_text_is_read_and_streamed_from_a_store(bucket: str) -> None:
    """A folder of files in two formats, whole and as a stream: the same rows; the stream goes on exactly."""
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    lines = ["".join(json.dumps({"text": text}) + "\n" for text in part) for part in (TEXTS[:20], TEXTS[20:])]
    fs.pipe(f"{bucket}/corpus/a.jsonl", lines[0].encode())
    fs.pipe(f"{bucket}/corpus/b.jsonl.gz", gzip.compress(lines[1].encode()))
    for url in (f"{bucket}/corpus", f"{bucket}/corpus/*.jsonl*"):
        assert load_rows(url)["text"][:] == TEXTS
    options = {"tokenizer": tiny_tokenizer(), "seq_len": 32, "micro_batch_size": 2}
    local = TextDataModule([{"text": text} for text in TEXTS], streaming=True, shuffle_buffer=8, **options)  # type: ignore
    remote = TextDataModule(f"{bucket}/corpus", streaming=True, shuffle_buffer=8, **options)  # type: ignore[arg-type]
    for data in (local, remote):
        data.setup("fit")
    here, there = iter(local.build_train_loader()), iter(loader := remote.build_train_loader())
    seen = []
    for step in range(12):
        (ours,), (theirs,) = next(here), next(there)
        assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
        seen.append(theirs["input_ids"].tolist())
        if step == 4:
            place = loader.state_dict()
    again = remote.build_train_loader()
    again.load_state_dict(place)
    assert [batch[0]["input_ids"].tolist() for _, batch in zip(range(7), again)] == seen[5:]
    with pytest.raises(ValueError, match=r"s3://.*nothing"):
        load_rows(f"{bucket}/nothing.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://bucket/a.jsonl", "NoCredentialsError.*Look at the credentials"),
        ("https://127.0.0.1:9/a.jsonl", "Look at the credentials .* and the endpoint"),
        ("nothing://bucket/a.jsonl", "Protocol not known"),
    ],
)
def test_a_store_that_cannot_be_reached_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, reason: str, streaming: bool
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ValueError, match=f"{url} cannot be read: .*{reason}"):
        TextDataModule(url, tokenizer=tiny_tokenizer(), streaming=streaming).prepare()


def test_a_mixture_of_folders_of_a_store_is_streamed(bucket: str) -> None:
    """Each source has its share, and a mixture goes on exactly."""
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    for name in ("wiki", "code"):
        fs.pipe(f"{bucket}/{name}/a.jsonl", "".join(json.dumps({"text": f"{name} {t}"}) + "\n" for t in TEXTS).encode())
    sources = [{"path": f"{bucket}/{name}", "weight": weight} for name, weight in (("wiki", 3), ("code", 1))]
    data = TextDataModule(
        sources, streaming=True, shuffle_buffer=8, tokenizer=tiny_tokenizer(), seq_len=32, micro_batch_size=4
    )
    data.setup("fit")
    loader = data.build_train_loader()
    first = [batch for _, (batch,) in zip(range(6), loader)]
    assert [int((batch["sources"] == 1).sum()) for batch in first] == [1] * 6
    again = data.build_train_loader()
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    next_ones = [next(iter(made))[0]["input_ids"].tolist() for made in (again, loader)]
    assert next_ones[0] == next_ones[1]
