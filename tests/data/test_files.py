"""Data as people have it: formats, compressions, folders, patterns, odd names, late and mixed types, broken files."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import logging
import lzma
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetInfo, Features, Json, Value

from automodel_trainer import ChatDataModule, TextDataModule
from automodel_trainer.data.arrow_rows import dataset_of_rows
from automodel_trainer.data.files import split_of
from automodel_trainer.data.formats import format_of
from automodel_trainer.data.sources import fingerprint, load_rows, load_validation_rows, open_stream
from tests.tiny import tiny_tokenizer

ROWS = [{"prompt": f"p{i}\n,'\"ü", "completion": f"0{i}"} for i in range(5)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


COMPRESS: dict[str, Any] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def quoted(values: list[str], delimiter: str) -> str:
    return delimiter.join('"' + value.replace('"', '""') + '"' for value in values) + "\n"


def arrow(rows: list[dict[str, Any]], file: bool) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    new: Any = pa.ipc.new_file if file else pa.ipc.new_stream
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def parquet_of(names: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * len(names), names=names), sink)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def content(form: str, rows: list[dict[str, Any]] = ROWS) -> bytes:
    delimiter = "\t" if form == ".tsv" else ","
    lines = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    texts = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        ".json": json.dumps(rows, indent=1),
        ".csv": "".join(quoted(line, delimiter) for line in lines),
        ".tsv": "".join(quoted(line, delimiter) for line in lines),
    }
    if form in texts:
        return texts[form].encode()
    return parquet(rows) if form == ".parquet" else arrow(rows, form == ".arrow")


def write(path: Path, form: str = ".jsonl", rows: list[dict[str, Any]] = ROWS, ending: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESS[ending](content(form, rows)))
    return path


def test_every_format_in_every_compression(tmp_path: Path) -> None:
    """Whole and streamed, in both forms of Arrow files; numbers in csv stay the texts that they are."""
    for form, ending in product((".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"), COMPRESS):
        path = write(tmp_path / f"rows{form}{ending}", form, ending=ending)
        assert load_rows(path).to_list() == ROWS, path.name
        assert list(open_stream(path)) == ROWS, path.name
    (tmp_path / "stream.arrow").write_bytes(arrow(ROWS, file=False))
    assert load_rows(tmp_path / "stream.arrow").to_list() == ROWS
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + content(".jsonl"))
    (tmp_path / "lines.json").write_bytes(content(".jsonl"))
    (tmp_path / "array.jsonl").write_bytes(content(".json"))
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "described.json").write_text(json.dumps({"version": "1", "meta": {"a": 1}, "data": ROWS}))
    for name in ("bom.jsonl", "lines.json", "array.jsonl", "wrapped.json", "described.json"):
        assert load_rows(tmp_path / name).to_list() == ROWS, name


def test_columns_of_categories_are_read_as_their_values(tmp_path: Path) -> None:
    """pandas writes categories as dictionaries, at any depth of a column."""
    names = pa.array(["a", "b", None, "a"])
    turns = pa.StructArray.from_arrays([names.dictionary_encode(), pa.array([1, 2, 3, 4])], ["role", "n"])
    kinds = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, 4], pa.int32()), names.dictionary_encode())
    table = pa.table({"text": names.dictionary_encode(), "turn": turns, "kinds": kinds})
    wanted = [
        {"text": name, "turn": {"role": name, "n": n}, "kinds": [name]} for n, name in enumerate(names.to_pylist(), 1)
    ]
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        assert load_rows(tmp_path / name).to_list() == wanted, name
        assert list(open_stream(tmp_path / name)) == wanted, name


def test_csv_of_semicolons(tmp_path: Path) -> None:
    """As spreadsheets write it where the comma is a decimal sign."""
    (tmp_path / "rows.csv").write_text('prompt;completion\n"a; b";0,5\nc;d\n')
    wanted = [{"prompt": "a; b", "completion": "0,5"}, {"prompt": "c", "completion": "d"}]
    assert load_rows(tmp_path / "rows.csv").to_list() == wanted


def test_csv_of_long_cells_empty_lines_and_old_line_ends(tmp_path: Path) -> None:
    long = "x,\n" * 500_000
    (tmp_path / "long.csv").write_text(f'\n a ,b\n"{long}",\n\n,"say ""hi"""\n')
    assert load_rows(tmp_path / "long.csv").to_list() == [{" a ": long, "b": ""}, {" a ": "", "b": 'say "hi"'}]
    (tmp_path / "mac.csv").write_bytes(b'\xef\xbb\xbf"a\r\nb",c\r1,2\r')
    assert load_rows(tmp_path / "mac.csv").to_list() == [{"a\r\nb": "1", "c": "2"}]


def test_names_of_bookkeeping_are_read_only_if_asked_for(tmp_path: Path) -> None:
    """Spark leaves rows in `_temporary` that are in the table too."""
    write(tmp_path / "table" / "part-0.jsonl")
    hidden = [write(tmp_path / "table" / name) for name in ("_temporary/0/part-0.jsonl", ".old/a.jsonl", "_b.jsonl")]
    assert load_rows(tmp_path / "table").to_list() == ROWS
    assert load_rows(f"{tmp_path}/table/**/*.jsonl").to_list() == ROWS
    for path in (*hidden, hidden[0].parent, f"{tmp_path}/table/_*.jsonl"):
        assert load_rows(path).to_list() == ROWS, path
    (tmp_path / "table" / "part-0.jsonl").unlink()
    with pytest.raises(ValueError, match=r"begin with _ are left out, as Spark does: _b\.jsonl, _temporary/0/part-0"):
        load_rows(tmp_path / "table")


def test_several_paths_are_no_source(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    for data in ([str(tmp_path / "a.jsonl")], {"a": str(tmp_path / "a.jsonl")}):
        with pytest.raises(ValueError, match=r"Several sources are a mixture: train: \[\{path: …, name: …\}, …\]"):
            load_rows(data)


def test_a_folder_of_several_formats_is_read_whole(tmp_path: Path) -> None:
    for number, form in enumerate((".jsonl", ".csv", ".parquet", ".arrow")):
        write(tmp_path / "mix" / "deep" / f"part{number}{form}", form, ROWS[number : number + 1])
    assert load_rows(tmp_path / "mix").to_list() == ROWS[:4]
    assert load_rows(f"{tmp_path}/mix/**/*.csv").to_list() == ROWS[1:2]
    assert load_rows(f"file://{tmp_path}/mix/deep/part1.csv").to_list() == ROWS[1:2]
    with pytest.raises(ValueError, match=r"no file matches the pattern .*\*\.tsv"):
        load_rows(f"{tmp_path}/mix/*.tsv")


def test_copies_in_another_format_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    text = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(3))
    (folder / "a.jsonl").write_text(text)
    (folder / "b.jsonl").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_rows(str(folder))) == 6
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.warns(UserWarning, match=r"a\.jsonl, a\.jsonl\.gz have one name .* trained twice"):
        assert len(load_rows(str(folder))) == 9


def test_brackets_are_names(tmp_path: Path) -> None:
    write(tmp_path / "chats1.jsonl", rows=ROWS[:1])
    for name in ("run[1]/chats.jsonl", "chats[1].jsonl", "what?.jsonl", "all*.jsonl"):
        path = write(tmp_path / name)
        assert load_rows(path).to_list() == load_rows(str(path)).to_list() == ROWS, name
    assert load_rows(tmp_path / "run[1]").to_list() == ROWS
    (tmp_path / "chats[1].jsonl").unlink()
    assert load_rows(f"{tmp_path}/chats[1].jsonl").to_list() == ROWS[:1], "now it is a pattern"


def test_split_names_count_as_whole_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, split in {
        "train.jsonl": "train",
        "train-00000-of-00005.parquet": "train",
        "wiki_val.jsonl.gz": "validation",
        "my.validation.csv": None,
        "dev/part1.csv": "validation",
        "test/train.jsonl": "train",
        "contest.jsonl": None,
        "latest.jsonl": None,
        "training_day.jsonl": "train",
        "trainer.jsonl": None,
        "best_tests.jsonl": None,
        "Validation2.jsonl": "validation",
        "the_test_of_time.jsonl": None,
    }.items():
        assert split_of(name) == split, name
    with pytest.raises(ValueError, match=r"two splits \(test and train\)"):
        split_of("test_of_train.jsonl")
    folder = tmp_path / "data"
    for number, name in enumerate(("contest.jsonl", "latest.csv", "val.jsonl", "test.jsonl")):
        write(folder / name, "." + name.split(".")[1], ROWS[number : number + 1])
    (folder / "README.md").write_text("no data")
    with caplog.at_level(logging.INFO):
        assert load_rows(folder).to_list() == ROWS[:2]
    assert "training does not read test.jsonl, README.md" in caplog.text
    validation = load_validation_rows(folder)
    assert validation is not None
    assert validation.to_list() == ROWS[2:3]
    assert load_rows(folder, "test").to_list() == ROWS[3:4]
    write(folder / "train.jsonl", rows=ROWS[4:])
    with pytest.warns(UserWarning, match=r"contest\.jsonl, latest\.csv left out"):
        assert load_rows(folder).to_list() == ROWS[4:]


def test_late_and_mixed_types_are_read_as_written(tmp_path: Path) -> None:
    """Null or [] for the first rows, values later; a new column; text or parts; a number of two kinds."""
    tool = {"function": {"name": "f", "parameters": {"properties": {"a": {"default": None}}}}}
    parts = [{"type": "text", "text": "hi"}]
    early: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "tools": [], "system": None, "n": 1}
    late: dict[str, Any] = {"messages": [{"role": "user", "content": parts}], "tools": [tool], "system": "s", "n": 1.5}
    rows = [early] * 2500 + [{**late, "more": True}]
    read = load_rows(write(tmp_path / "late.jsonl", rows=rows))
    assert read.column_names == ["messages", "tools", "system", "n", "more"]
    assert read[0] == {**early, "more": None}
    assert read[2500] == rows[-1]
    assert dataset_of_rows(rows)[2500] == rows[-1]
    mixed = [{"prompt": "a", "completion": [1]}, {"prompt": [{"role": "user", "content": "b"}], "completion": "c"}]
    assert load_rows(write(tmp_path / "mixed.jsonl", rows=mixed)).to_list() == mixed
    # Beside a typed file, what Arrow adds is dropped, and what JSON says is kept.
    write(tmp_path / "both" / "a.parquet", ".parquet", [{"tools": [{"a": 1}]}, {"tools": [{"b": 2}]}])
    write(tmp_path / "both" / "b.jsonl", rows=[{"tools": [{"c": None}]}])
    assert [row["tools"] for row in load_rows(tmp_path / "both")] == [[{"a": 1}], [{"b": 2}], [{"c": None}]]


def test_nulls_that_the_user_wrote_reach_the_template(tmp_path: Path) -> None:
    schema = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"default": None}}}}}
    call = {"type": "function", "id": None, "function": {"name": "f", "arguments": {"n": None}}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b"], "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "tools": [schema],
    }
    path = write(tmp_path / "calls.jsonl", rows=[row])
    as_text = {"messages": json.dumps(row["messages"]), "tools": [json.dumps(schema)]}
    for rows in (load_rows(path), load_rows([row]), load_rows([as_text]), Dataset.from_list([as_text])):
        conversation = format_of(rows).to_messages(rows[0])
        assert conversation.tools == [schema]
        assert conversation.messages[0] == {"role": "user", "content": "ab"}
        assert conversation.messages[1]["tool_calls"] == [
            {"type": "function", "function": {"name": "f", "arguments": {"n": None}}}
        ]


def test_numbers_are_read_as_written(tmp_path: Path) -> None:
    """In nested values, of files, lists and data sets of others: the parser of `datasets` changes them."""
    values = [1 / 3, 2**64, -(2**63) - 1, 0.1 + 0.2, -0.0, 1e-320, float("nan"), [{"x": 2 / 3}]]
    rows = [{"text": "a", "meta": {"x": value}} for value in values]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs = Dataset(
        load_rows(rows[:2]).data.table, info=DatasetInfo(features=Features(text=Value("string"), meta=Json()))
    )
    for given in (str(tmp_path / "a.jsonl"), rows, theirs):
        found = load_rows(given)
        assert list(map(repr, found["meta"][:])) == [repr(row["meta"]) for row in rows[: len(found)]]
    assert fingerprint(load_rows(theirs)) == fingerprint(theirs), "the place in the data stays"
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1 / 3, "y": None}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    kept = format_of(data := load_rows([{"messages": turns}]), None).to_messages(data[0])
    assert kept.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1 / 3, "y": None}


def test_values_that_no_file_can_hold_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 1500 + json.dumps({"text": "\ud800"}) + "\n")
    (tmp_path / "0.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl row 1501, column 'text': a text holds \\ud800, half of"):
        load_rows(str(tmp_path))
    stream = TextDataModule(str(tmp_path), streaming=True, shuffle_buffer=0, tokenizer=tiny_tokenizer(), seq_len=8)
    stream.setup("fit")
    with pytest.raises(ValueError, match=r"row 1501 of the stream \(row 1500 of .*a\.jsonl\): a text holds \\ud800"):
        list(zip(range(600), stream.build_train_loader()))
    for value, name in (({1, 2}, "set"), (object(), "object")):
        with pytest.raises(ValueError, match=f"row 1 of the data, column 'meta': a value is a {name}"):
            load_rows([{"meta": [1]}, {"meta": [value]}])
    assert load_rows([{"meta": [np.arange(2), np.float32(1)]}])["meta"][:] == [[[0, 1], 1.0]]
    with pytest.raises(ValueError, match="the rows have a column 1, and the names of columns are texts"):
        load_rows([{1: "a"}])
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"c\.jsonl is a link to a file that does not exist"):
        load_rows(str(tmp_path))


def test_turns_that_say_nothing_are_reported(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    empty = [*turn, {"role": "user", "content": "q"}, {"role": "assistant", "content": None}]
    path = write(tmp_path / "empty.jsonl", rows=[{"messages": turn}, {"messages": empty}])
    data = ChatDataModule(path, tokenizer=tiny_tokenizer(), seq_len=256)
    with pytest.warns(UserWarning, match=r"1 conversations have a turn without content.*row 1 of the data \("):
        data.prepare()
    again = ChatDataModule(path, tokenizer=tiny_tokenizer(), seq_len=256)
    with pytest.warns(UserWarning, match="1 conversations"):  # also where the tokens come from the cache
        again.prepare()


def test_broken_files_are_named_with_the_row(tmp_path: Path) -> None:
    good = content(".jsonl")
    broken: dict[str, tuple[bytes, str]] = {
        "a.jsonl": (good + b'{"prompt": \n', r"a\.jsonl line 6 is not valid JSON"),
        "b.jsonl": (good + b"[1]\n", r"b\.jsonl line 6 holds a list"),
        "c.jsonl": (good + b'{"a": "\xff"}\n', r"c\.jsonl line 6 is not UTF-8"),
        "d.json": (b'[{"a": 1}, 2]', r"d\.json row 2 holds a int"),
        "e.csv": (b"a,b\n1,2\n\n1,2,3\n", r"e\.csv line 4 has 3 cells, and the header has 2"),
        "q.csv": (b'a,b\n1,2\n"x" y,2\n', r"q\.csv line 3 is not valid: .* goes on after the quote that ends it"),
        "r.csv": (b'a,b\n"1\n1",2\n"x,2\n3,4\n', r"r\.csv line 4 is not valid: .* no other quote ends it"),
        "s.tsv": (b'a\tb\n"x \\"y\\""\t2\n', r"s\.tsv line 2 is not valid: .* must be in quotes, and these doubled"),
        "f.csv": (b"a,a\n1,2\n", r"f\.csv has two columns of one name"),
        "g.jsonl.gz": (gzip.compress(good)[:-20], r"g\.jsonl\.gz cannot be read"),
        "h.jsonl.xz": (good, r"h\.jsonl\.xz cannot be read"),
        "t.parquet": (parquet_of(["a", "a"]), r"t\.parquet has two columns of one name: \['a', 'a'\]"),
        "i.parquet": (b"nothing", r"i\.parquet cannot be read"),
        "j.arrow": (b"nothing of arrow", r"j\.arrow cannot be read"),
        "k.jsonl.zst": (good, r"k\.jsonl\.zst cannot be read"),
        "l.txt": (
            b"\xff\xfe",
            r"l\.txt line 1 is not UTF-8 text: byte 0 of the file is 0xff\. Convert it: iconv -f utf-16",
        ),
        "m.csv": (
            b"a,b\n" + b"1,2\n" * 3 + b"\xe9,1\n",
            r"m\.csv line 5 is not UTF-8 text: byte 16 .* is 0xe9\..*latin1",
        ),
        "n.csv": (b"\xe9,b\n1,2\n", r"n\.csv line 1 is not UTF-8 text: byte 0 .*iconv -f latin1 -t utf-8 n\.csv"),
        "o.tsv.gz": (
            gzip.compress(b"a\tb\n\xe9\t1\n"),
            r"o\.tsv\.gz line 2 is not UTF-8 .*Decompress it, and convert it",
        ),
        "p.jsonl": ('{"a": 1}\n'.encode("utf-16"), r"p\.jsonl line 1 is not UTF-8 .*iconv -f utf-16"),
    }
    for name, (data, message) in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_rows(tmp_path / name)
    write(tmp_path / "two" / "a.jsonl", rows=[{"messages": [{"role": "user", "content": "q"}]}] * 3)
    write(tmp_path / "two" / "b.jsonl", rows=[{"messages": [{"role": "king", "content": "q"}]}])
    with pytest.raises(ValueError, match=r"row 3 of the data \(row 0 of .*b\.jsonl\).*unknown role 'king'"):
        ChatDataModule(tmp_path / "two", tokenizer=tiny_tokenizer(), seq_len=256).prepare()


def test_files_of_other_columns_are_named(tmp_path: Path) -> None:
    """Chats would stop at the first row without a conversation, and texts would be left out without a word."""
    chats = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    write(tmp_path / "a.jsonl", rows=[chats] * 3)
    (tmp_path / "b.csv").write_text("prompt,response\nq,a\n")
    with pytest.raises(
        ValueError, match=r"a\.jsonl has \['messages'\], and .*b\.csv has \['prompt', 'response'\]"
    ) as e:
        ChatDataModule(tmp_path, tokenizer=tiny_tokenizer(), seq_len=256).prepare()
    assert "(train: [{path: a.jsonl}, {path: b.csv}]), or put them into separate folders" in str(e.value)
    mixture = [{"path": tmp_path / "a.jsonl"}, {"path": tmp_path / "b.csv"}]
    ChatDataModule(mixture, tokenizer=tiny_tokenizer(), seq_len=256).prepare()
    write(tmp_path / "texts" / "a.jsonl", rows=[{"text": "t"}, {"text": None}])
    write(tmp_path / "texts" / "b.jsonl", rows=[{"text": None}, {"text": "t"}])
    TextDataModule(tmp_path / "texts", tokenizer=tiny_tokenizer(), seq_len=8).prepare()
    write(tmp_path / "texts" / "c.jsonl", rows=[{"content": "t"}])
    with pytest.raises(ValueError, match=r"c\.jsonl has \['content'\], without \['text'\]"):
        TextDataModule(tmp_path / "texts", tokenizer=tiny_tokenizer(), seq_len=8).prepare()
    stream = TextDataModule(tmp_path / "texts", tokenizer=tiny_tokenizer(), seq_len=8, streaming=True)
    stream.prepare()
    with pytest.raises(
        ValueError,
        match=r"row 4 of the stream \(row 0 of .*c\.jsonl\) has no column 'text'; its columns are \['content'\]",
    ):
        stream._stream._blocks(stream._stream.beginning()).__next__()  # type: ignore[union-attr]


def test_a_changed_file_is_read_again_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "rows.jsonl")
    load_rows(path)
    write(path, rows=ROWS[:2] * 3)
    with caplog.at_level(logging.INFO):
        assert load_rows(path).to_list() == ROWS[:2] * 3
    assert "rows.jsonl changed since it was read last: it is read again" in caplog.text


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file")
    path = write(tmp_path / "rows.jsonl")
    with pytest.warns(UserWarning, match="The cache of datasets cannot be written"):
        assert load_rows(path).to_list() == ROWS
    monkeypatch.setenv("AMT_CACHE", str(tmp_path / "file"))
    data = ChatDataModule(path, tokenizer=tiny_tokenizer(), seq_len=256)
    with pytest.warns(UserWarning, match=r"The token cache .* cannot be written"):
        data.prepare()
    assert len(data.rows["train"]) > 0


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write(tmp_path / "rows.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr("automodel_trainer.data.arrow_rows._write_rows", full)
        with pytest.raises(ValueError, match=r"no space to write rows\.jsonl to .* set HF_HOME"):
            load_rows(path)
    monkeypatch.setattr("datasets.Dataset.save_to_disk", full)
    with pytest.raises(ValueError, match=r"no space to write tokens to .* set AMT_CACHE"):
        ChatDataModule(path, tokenizer=tiny_tokenizer(), seq_len=256).prepare()
