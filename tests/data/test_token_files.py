"""Corpora of tokens: Megatron's files, plain files, splits and blends, and `amt tokenize`, against the raw text."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from automodel_trainer import CausalLMModule, TextDataModule, TokenDataModule, Trainer
from automodel_trainer.cli import main as amt
from automodel_trainer.data.token_files import TokenFile, TokenFileWriter, parse_split
from automodel_trainer.tools.errors import explain_errors
from automodel_trainer.tools.tokenize import main, tokenize_files
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = [f"document {i} " + "word " * (i * 7 % 23) for i in range(40)]


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, Path]:
    """Raw text in two files, and a tokenizer."""
    for number, part in enumerate((TEXTS[:25], TEXTS[25:])):
        (tmp_path / f"part{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path, tmp_path / "tokenizer"


def rows_of(data: Any) -> list[list[int]]:
    data.setup("fit")
    rows = data.rows["train"]
    return [[i for document in row for i in document.input_ids.tolist()] for row in rows.fetch(range(len(rows)))]


@pytest.mark.parametrize("workers", [1, 2])
def test_tokenized_text_trains_as_the_text_itself(
    corpus: tuple[Path, Path], workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rows, cut into several shards; the same boundaries of documents."""
    folder, tokenizer = corpus
    done = tokenize_files(f"{folder}/part*.jsonl", str(tokenizer), tmp_path / "out", workers=workers, shard_bytes=500)
    assert len(done["shards"]) >= 1
    assert not list((tmp_path / "out").glob("*.tmp"))
    text = TextDataModule([{"text": text} for text in TEXTS], tokenizer=tiny_tokenizer(), seq_len=32, cache=False)
    tokens = TokenDataModule(tmp_path / "out", tokenizer=tiny_tokenizer(), seq_len=32)
    assert rows_of(tokens) == rows_of(text)
    assert done["tokens"] == sum(map(len, rows_of(text)))
    assert done["documents"] == len(TEXTS)
    first, second = (data.rows["train"].fetch([3])[0] for data in (tokens, text))
    assert [d.input_ids.tolist() for d in first] == [d.input_ids.tolist() for d in second]
    with pytest.raises(ValueError, match=r"out holds shard-00000\.bin"):
        tokenize_files(f"{folder}/part*.jsonl", str(tokenizer), tmp_path / "out")
    arguments = ["--tokenizer", str(tokenizer), "--output", str(tmp_path / "b"), "--column", "body"]
    with pytest.raises(ValueError, match=r"part0\.jsonl has no column 'body'; its columns are \['text'\]"):
        main([str(folder / "part0.jsonl"), *arguments, "--workers", "1"])
    assert not list((tmp_path / "b").iterdir())
    (folder / "gaps.jsonl").write_text('{"text": "a"}\n{"content": "b"}\n{"text": ""}\n')
    main([str(folder / "gaps.jsonl"), *arguments[:2], "--output", str(tmp_path / "c"), "--workers", "1"])
    assert "2 rows have no text in column 'text' and were left out" in capsys.readouterr().out
    (folder / "odd.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(ValueError, match=r"row 1 of .*odd\.jsonl: column 'text' must hold texts, found int: '5'"):
        main([str(folder / "odd.jsonl"), *arguments[:4], "--workers", "1"])
    with pytest.raises(ValueError, match="must hold texts, found int: '5'"):
        TextDataModule(folder / "odd.jsonl", tokenizer=tiny_tokenizer(), cache=False).prepare()


def megatron(prefix: Path, documents: list[list[list[int]]], dtype: Any = np.uint16, code: int = 8) -> None:
    """As Megatron writes it: documents of several sequences, written here with struct alone."""
    sequences = [sequence for document in documents for sequence in document]
    tokens = np.concatenate([np.array(sequence, dtype) for sequence in sequences])
    tokens.tofile(f"{prefix}.bin")
    lengths = [len(sequence) for sequence in sequences]
    starts = [sum(lengths[:i]) * np.dtype(dtype).itemsize for i in range(len(lengths))]
    bounds = [sum(len(d) for d in documents[:i]) for i in range(len(documents) + 1)]
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(bounds))
    body = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(starts)}q", *starts)
    Path(f"{prefix}.idx").write_bytes(head + body + struct.pack(f"<{len(bounds)}q", *bounds))


def test_an_output_that_cannot_be_made_is_named_before_any_work(
    corpus: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder under a file; of every command that writes one."""
    folder, tokenizer = corpus
    (tmp_path / "file").write_text("")
    output, model = str(tmp_path / "file" / "out"), str(tmp_path / "model")
    tiny_model().save_pretrained(model)
    for command in (
        ["tokenize", f"{folder}/part*.jsonl", "--tokenizer", str(tokenizer), "--output", output],
        ["reshard", model, "--output", output, "--shards", "1"],
        ["merge", model, "--output", output],
        ["export", model, "--output", output],
    ):
        with pytest.raises(SystemExit) as stopped:
            amt(command)
        assert stopped.value.code == 1
        assert f"cannot be written to {output}"[:-4] in capsys.readouterr().err, command


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.bin holds no tokens"):
        TokenDataModule(tmp_path / "a.bin", tokenizer=tiny_tokenizer(), seq_len=8).prepare()


def test_what_the_system_says_of_files_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/shard-00001.bin")

    with pytest.raises(SystemExit):
        explain_errors(full)
    assert "No space left on device (/data/shard-00001.bin). Look at the folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        explain_errors(lambda: yaml.safe_load("a: b\n c: d"))
    assert "a YAML file cannot be read: mapping values are not allowed here" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):  # a bug of ours
        explain_errors(lambda: Path("/nothing").stat())


def test_megatron_files(tmp_path: Path) -> None:
    documents = [[[1, 2, 3], [4, 5]], [[6]], [[7, 8, 9, 10]], [[11, 12], [13]]]
    for dtype, code in ((np.uint16, 8), (np.int32, 4)):
        megatron(tmp_path / "m", documents, dtype, code)
        file = TokenFile(tmp_path / "m")
        assert file.documents == 4
        assert [d.input_ids.tolist() for d in file.fetch(range(6))] == [s for d in documents for s in d]
        assert file.sample_ids.tolist() == [0, 0, 1, 2, 3, 3]
        assert file.highest() == (13, 3)
    data = TokenDataModule(tmp_path / "m", split="2,1,1", seq_len=4)
    data.setup("fit")
    found = {
        split: [[d.input_ids.tolist() for d in row] for row in rows.fetch(range(len(rows)))]
        for split, rows in data.rows.items()
    }
    assert found == {
        "train": [[[1, 2, 3, 4]], [[5], [6]]],
        "validation": [[[7, 8, 9, 10]]],
        "test": [[[11, 12, 13]]],
    }
    blend = [
        {"path": tmp_path / "m", "weight": 1, "name": "a"},
        {"path": f"{tmp_path}/m.bin", "weight": 1, "name": "b"},
    ]
    shared = TokenDataModule(blend, split="2,1,1", seq_len=4)
    shared.setup("fit")
    assert sorted(shared.rows) == ["test/a", "test/b", "train", "validation/a", "validation/b"]
    assert sorted(shared.test_dataloader()) == sorted(shared.predict_dataloader()) == ["a", "b"]
    with pytest.raises(ValueError, match=r"leaves no document of .*m for validation: it has 4 in 1 file\(s\)"):
        TokenDataModule(blend, split="969,30,1", seq_len=4).prepare()
    with pytest.raises(ValueError, match="leaves nothing for training"):
        TokenDataModule(blend, split="0,1", seq_len=4).prepare()
    mixed = TokenDataModule(blend, seq_len=4)
    mixed.setup("fit")
    assert mixed.rows["train"].shares["a"][0] == pytest.approx(0.5)  # type: ignore[attr-defined]


def test_a_negative_token_is_named(tmp_path: Path) -> None:
    """Of an index that names a signed type for unsigned tokens, say. The embedding would take the last row for it."""
    for code, dtype in ((2, np.int8), (3, np.int16), (4, np.int32), (5, np.int64)):
        megatron(tmp_path / "m", [[[1, 2, 3]], [[4, -6]], [[7]]], dtype, code)
        with pytest.raises(ValueError, match=r"Document 1 of .*m\.bin has token -6\. Tokens are 0 or more"):
            TokenFile(tmp_path / "m").highest()


def test_plain_files(tmp_path: Path) -> None:
    """nanoGPT has no header, llm.c has one; documents end with EOS."""
    tokens = [5, 6, 4, 7, 4, 8, 9]
    np.array(tokens, np.uint16).tofile(tmp_path / "nano.bin")
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    (tmp_path / "llmc.bin").write_bytes(header.tobytes() + np.array(tokens, np.uint16).tobytes())
    for name in ("nano.bin", "llmc.bin"):
        file = TokenFile(tmp_path / name, end=4)
        assert [d.input_ids.tolist() for d in file.fetch(range(len(file)))] == [[5, 6, 4], [7, 4], [8, 9]]
        assert len(TokenFile(tmp_path / name)) == 1, "without an end they are one"
    assert TokenFile(tmp_path / "nano.bin", end=9).documents == 1


def test_a_plain_file_of_wider_tokens_is_refused(tmp_path: Path) -> None:
    """Read as uint16 it would be twice as long, and every second token 0."""
    draw = np.random.default_rng(0)
    for name, high in (("small", 65), ("large", 1 << 18)):
        draw.integers(0, high, 9999).astype(np.uint32).tofile(tmp_path / f"{name}.bin")
        with pytest.raises(ValueError, match=rf"{name}\.bin has no header.*Set token_dtype='uint32', or token_dt"):
            TokenDataModule(tmp_path / f"{name}.bin", document_end=None).build_rows()
        assert int(TokenFile(tmp_path / f"{name}.bin", dtype="uint32").lengths.sum()) == 9999
        assert int(TokenFile(tmp_path / f"{name}.bin", dtype="uint16").lengths.sum()) == 2 * 9999, "as asked"
    draw.integers(0, 50257, 9999).tofile(tmp_path / "eight.bin")
    with pytest.raises(ValueError, match=r"tokens of 8 bytes.*astype\(np.uint32\)"):
        TokenFile(tmp_path / "eight.bin")
    for high in (4, 65, 50257):
        draw.integers(0, high, 10_000).astype(np.uint16).tofile(tmp_path / "right.bin")
        assert int(TokenFile(tmp_path / "right.bin").lengths.sum()) == 10_000
    with pytest.raises(ValueError, match=r"token_dtype='int64' is unknown\. Allowed: 'uint16', 'uint32', or null"):
        TokenDataModule(tmp_path / "right.bin", token_dtype="int64")
    narrow = TokenDataModule(tmp_path / "right.bin", token_dtype="uint32", document_end=None)
    narrow.prepare()
    with pytest.raises(ValueError, match="the model's vocab_size is 50,257"):
        narrow.check_sizes(50257, None, False)


def test_it_trains_and_resumes(tmp_path: Path) -> None:
    writer = TokenFileWriter(tmp_path / "t", 264)
    draw = np.random.default_rng(0)
    for _ in range(30):
        ids = draw.integers(6, 264, 20)
        writer.add([len(ids)], ids)
    writer.close()

    def fit(steps: int, **options: Any) -> float:
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_ledger": False}
        root = {"default_root_dir": tmp_path, "log_every_n_steps": 1}
        trainer = Trainer(accelerator="cpu", devices=1, max_steps=steps, **root, **quiet)  # type: ignore[arg-type]
        data = TokenDataModule(tmp_path / "t", split="9,1", seq_len=16)
        trainer.fit(CausalLMModule(tiny_model(), tokenizer=tiny_tokenizer(), scheduler="constant"), data, **options)
        return float(trainer.callback_metrics["train_loss"])

    whole = fit(6)
    fit(3)
    assert fit(6, ckpt_path="last") == whole


def test_bad_files_are_named(tmp_path: Path) -> None:
    megatron(tmp_path / "m", [[[1, 2, 3]]])
    index = (tmp_path / "m.idx").read_bytes()
    for data, message in (
        (b"nothing", "no index of Megatron"),
        (index[:9] + struct.pack("<Q", 7) + index[17:], "version 7"),
        (index[:40], "is cut off"),
    ):
        (tmp_path / "m.idx").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            TokenFile(tmp_path / "m")
    (tmp_path / "m.idx").write_bytes(index)
    (tmp_path / "m.bin").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match="is shorter than"):
        TokenFile(tmp_path / "m")
    with pytest.raises(ValueError, match="no file of tokens"):
        TokenFile(tmp_path / "none")
    (tmp_path / "odd.bin").write_bytes(b"\0\0\0")
    with pytest.raises(ValueError, match="no whole number of uint16"):
        TokenFile(tmp_path / "odd.bin")
    for split in ("a", "1,2,3,4", "-1,2", ""):
        with pytest.raises(ValueError, match="is no split"):
            parse_split(split)
