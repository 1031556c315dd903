"""`amt watch` and `amt diff` on real runs, and on folders that are half written, foreign, damaged or hostile."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from automodel_trainer.callbacks import Ledger
from automodel_trainer.tools.watch import run as run_file
from automodel_trainer.tools.watch.curves import read_curves
from automodel_trainer.tools.watch.diff import compare, diff
from automodel_trainer.tools.watch.page import page
from automodel_trainer.tools.watch.ranks import means, stragglers
from automodel_trainer.tools.watch.run import read_run
from automodel_trainer.tools.watch.server import Server
from automodel_trainer.verification.report import Quantity, Report
from tests.browser import CHROMIUM, Browser
from tests.processes import amt
from tests.tiny import tiny_model, tiny_tokenizer

SCRIPT = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
OPTIONS = [
    "--model",
    "my-model",
    "--data",
    "chats.jsonl",
    "--steps",
    "4",
    "--seq-len",
    "512",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ in the learning rate; the chats hold scripts."""
    folder = tmp_path_factory.mktemp("watch")
    tiny_model(tie_word_embeddings=True).save_pretrained(folder / "my-model")
    tiny_tokenizer().save_pretrained(folder / "my-model")
    turns = [{"role": "user", "content": SCRIPT}, {"role": "assistant", "content": f"{SCRIPT} four"}]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(40)))
    for name, rate in (("a", "1e-2"), ("b", "1e-3")):
        loggers = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir=runs/{name}"] if name == "b" else []
        every = ["--trainer.log_every_n_steps=1", "--lr", rate, "--output", f"runs/{name}"]
        amt("fit", *OPTIONS, *every, *loggers, folder=folder)
    return folder


class Tags(HTMLParser):
    """What a page holds: its tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def check_harmless(text: str) -> Tags:
    found = Tags(text)
    assert not {tag for tag, _ in found.tags} & {"script", "iframe", "object", "embed", "form", "a", "link"}
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert tag != "img" or (attributes["src"] or "").startswith("/picture/")
    return found


def test_the_page_of_a_run(home: Path) -> None:
    run = read_run(home / "runs/a")
    assert (run.step, run.planned, run.going_on) == (4, 4, False)
    found = check_harmless(page(run))
    for words in (
        "train_loss",
        "tokens per second",
        "gradient norm",
        "optimizer",
        "AdamW",
        "names and sizes are right",
    ):
        assert words in found.text, words
    assert sum(tag == "polyline" for tag, _ in found.tags) >= 5
    assert sum(attributes.get("class") == "trained" for _, attributes in found.tags) >= 2  # the legend's, and the row's
    assert ["trained", f"{SCRIPT} four<|im_end|>"] in [
        part for document in run.ledger["first_row"] for part in document
    ]
    assert SCRIPT in found.text


@pytest.mark.parametrize("name", ["a", "b"])
def test_curves_are_those_of_the_logger(home: Path, name: str) -> None:
    """TensorBoard's own reader, or the lines of the CSV file."""
    folder = home / "runs" / name
    curves, problems = read_curves(folder)
    assert not problems
    if name == "a":
        theirs = EventAccumulator(str(next(folder.rglob("events.out.tfevents.*")).parent)).Reload()
        tags = theirs.Tags()["scalars"]
        assert set(tags) == set(curves)
        for tag in tags:
            assert curves[tag] == {event.step: event.value for event in theirs.Scalars(tag)}
    else:
        assert len(curves["train_loss"]) == 4


def test_half_written(home: Path, tmp_path: Path) -> None:
    """An event file that ends anywhere gives the records before its end; a torn ledger is said."""
    shutil.copytree(home / "runs/a", tmp_path / "run", symlinks=True)
    whole, _ = read_curves(tmp_path / "run")
    file = next((tmp_path / "run").rglob("events.out.tfevents.*"))
    content = file.read_bytes()
    for size in range(0, len(content), 97):
        file.write_bytes(content[:size])
        curves, problems = read_curves(tmp_path / "run")
        assert not problems
        assert all(curve.items() <= whole[name].items() for name, curve in curves.items())
    file.write_bytes(content[:100] + b"\xff" * 40 + content[140:])
    assert read_curves(tmp_path / "run")[1]
    ledger = tmp_path / "run" / "ledger.json"
    ledger.write_text(ledger.read_text()[:200])
    latest = (tmp_path / "run/checkpoints/latest").resolve()
    weights = next((latest / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    run = read_run(tmp_path / "run")
    text = check_harmless(page(run)).text
    assert "half written or damaged" in text
    assert f"{weights.name} is damaged" in text


@pytest.mark.parametrize(
    "ledger", ['{"schema": 9, "what": {"deep": [1]}}', "[1, 2]", "{", '{"first_row": 3, "run": null}', "null", '"x"']
)
def test_a_foreign_ledger_is_shown_as_it_is(ledger: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text(ledger)
    (tmp_path / "config.yaml").write_text(f"a: [\n{SCRIPT}")
    (tmp_path / "metrics.csv").write_text(f"step,{SCRIPT},train_loss\n1,2.0,nan\n2,3.0,inf\nx,y\n3,")
    run = read_run(tmp_path)
    text = check_harmless(page(run)).text
    assert SCRIPT in text
    assert "deep" not in ledger or "deep" in text
    assert diff(run, run)["loss"] == {"train_loss": {"steps": 2, "first_different": None, "largest": 0.0}}


def test_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds notes.txt, and no ledger.json"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        read_run(tmp_path / "nothing")
    with pytest.raises(ValueError, match="there is no such folder"):
        read_run(tmp_path / "notes.txt")


def write_ranks(folder: Path, steps: int, ranks: int) -> None:
    """Rank 2 waits for its data, and the last one computes twice as long as the others."""
    lines = [
        {
            "step": step,
            "data_wait": [0.5 if rank == 2 else 0.001 for rank in range(ranks)],
            "cpu": [2.0 if rank == ranks - 1 else 1.0 for rank in range(ranks)],
            "peak_memory_gib": [3.0] * ranks,
            "own": [1.0] * ranks,
            "probe": [0.0] * ranks,
            "said": [f"rank 2 ({SCRIPT})"] if step == 3 else 7,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "ranks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_ranks(tmp_path: Path) -> None:
    """The slowest stand first and are marked; lines that are torn, foreign or of another layout are left out."""
    (tmp_path / "config.yaml").write_text("a: 1")
    write_ranks(tmp_path, 12, 20)
    file = tmp_path / "ranks.jsonl"
    foreign = ['{"step": 0, "data_wait": [1], "cpu": [1], "peak_memory_gib": [1]}', "[]", '{"step": "x"}', SCRIPT]
    file.write_text("\n".join(foreign) + "\n" + file.read_text() + '{"step": 13, "data_wa')
    run = read_run(tmp_path)
    assert [line["step"] for line in run.ranks] == list(range(1, 13))
    found = check_harmless(page(run))
    assert re.findall(r"<tr><th>(\d+)</th>", page(run))[:3] == ["19", "2", "0"]
    assert stragglers(means(run.ranks)["data_wait"], 0.01) == {2}
    assert stragglers(means(run.ranks)["cpu"], 0.01) == {19}
    assert stragglers(means(run.ranks)["peak_memory_gib"], 0.1) == set()
    assert sum(attributes.get("class") == "bad" for tag, attributes in found.tags if tag == "td") == 2
    assert "and 4 ranks that are faster" in found.text
    assert f"straggler: rank 2 ({SCRIPT})" in found.text
    assert not read_run(tmp_path).problems
    file.write_text('{"step": 1, "data_wait": [1], "cpu": [1], "peak_memory_gib": [1]}')
    assert re.findall(r"<tr><th>(\d+)</th>", page(read_run(tmp_path))) == ["0"], "as version 0.1 wrote it"
    file.write_text("")
    assert "Ranks" not in check_harmless(page(read_run(tmp_path))).text


@pytest.mark.parametrize("wrong_by", [-3600, 3600])
def test_the_clock_of_a_run_s_machine_may_be_wrong(
    wrong_by: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second look on, only this machine's clock counts."""
    now = [0.0]
    monkeypatch.setattr(run_file, "time", SimpleNamespace(time=time.time, monotonic=lambda: now[0]))
    write_ranks(tmp_path, 1, 2)
    (tmp_path / "config.yaml").write_text("a: 1")

    def writes(at: float) -> None:
        os.utime(tmp_path / "ranks.jsonl", (at, at))

    writes(time.time() + wrong_by)
    assert read_run(tmp_path).going_on == (wrong_by > 0), "at the first look nobody knows"
    now[0] += 10
    writes(time.time() + wrong_by + 10)
    assert read_run(tmp_path).going_on
    now[0] += 300
    assert not read_run(tmp_path).going_on
    assert "last change 5 minutes ago" in page(read_run(tmp_path))


def test_two_runs_over_each_other(home: Path, tmp_path: Path) -> None:
    first, second = read_run(home / "runs/a"), read_run(home / "runs/b")
    found = check_harmless(page(first, second))
    labels = [str(attributes["aria-label"]) for tag, attributes in found.tags if tag == "svg"]
    assert "train_loss, B: train_loss" in labels
    assert "differs first at step" in found.text
    assert "model.init_args.lr" in found.text
    (tmp_path / SCRIPT.replace("/", "")).mkdir()
    hostile = tmp_path / SCRIPT.replace("/", "")
    (hostile / "metrics.csv").write_text(f"step,{SCRIPT.replace(',', '')},train_loss\n1,2.0,3.0\n")
    (hostile / "config.yaml").write_text(f"a: {json.dumps(SCRIPT)}")
    assert SCRIPT in check_harmless(page(first, read_run(hostile))).text
    amt("watch", "runs/a", "runs/b", "--html", "both.html", folder=home)
    check_harmless((home / "both.html").read_text())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_run_of_another_user(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0)
    with pytest.raises(ValueError, match="cannot be read"):
        read_run(tmp_path / "run")


@pytest.fixture
def server(home: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copytree(home / "runs/a", tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "moe_load.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg">{SCRIPT}</svg>')
    write_ranks(tmp_path / "run", 4, 4)
    with Server(tmp_path / "run", beside=home / "runs/b") as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def ask(server: Server, path: str, host: str | None = None) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def test_the_server_is_for_this_machine_and_runs_nothing(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    status, text, headers = ask(server, "/")
    assert status == 200
    check_harmless(text)
    assert "script-src" not in headers["Content-Security-Policy"]
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    status, _, headers = ask(server, "/picture/0")
    assert status == 200
    assert "sandbox" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    for path in ("/picture/1", "/picture/../ledger.json", "/ledger.json", "/../../etc/passwd", "/picture/-1"):
        assert ask(server, path)[0] == 404
    assert ask(server, "/", host="evil.example:80")[0] == 403


def test_a_run_that_is_gone_for_a_while(server: Server) -> None:
    """The page says so, and loads itself again."""
    server.folder.rename(server.folder.with_name("<b>away"))
    server.folder = server.folder.with_name("<b>nowhere")
    status, text, _ = ask(server, "/")
    assert status == 500
    assert "there is no such folder" in check_harmless(text).text
    assert "<b>" not in text
    assert 'http-equiv="refresh"' in text


def test_in_a_browser(server: Server, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    browser = Browser(tmp_path / "profile")
    try:
        for width, dark in ((1280, False), (390, True)):
            browser.screen(width, 900, dark=dark)
            browser.open(server.url)
            assert browser.run("document.title") == "run"
            assert browser.run("document.documentElement.scrollWidth <= innerWidth")
            assert browser.run("document.querySelectorAll('svg polyline').length") >= 10
            both = "document.querySelector('svg[aria-label=\"train_loss, B: train_loss\"]')"
            colours = f"[...{both}.querySelectorAll('polyline')].map(line => getComputedStyle(line).stroke)"
            assert len(set(browser.run(colours))) == 2
            assert browser.run("[...document.querySelectorAll('td.bad')].length") == 2
            assert browser.run("document.querySelector('img').naturalWidth !== undefined")
        browser.open(f"{server.url}picture/0")
        assert browser.run("document.title") != "taken"
        assert {url for url in browser.requests if not url.startswith(server.url)} == set()
    finally:
        browser.close()


def test_diff(home: Path) -> None:
    """The same seed and data: the first loss is the same, and the learning rate parts the runs after it."""
    first, second = read_run(home / "runs/a"), read_run(home / "runs/b")
    facts = diff(first, second)
    assert facts["config"]["model.init_args.lr"] == (0.01, 0.001)
    assert facts["first_row"] is True
    losses = facts["loss"]["train_loss"]
    steps = sorted(first.curves["train_loss"])
    assert losses["first_different"]["step"] == steps[1]
    assert losses["first_different"]["values"] == tuple(run.curves["train_loss"][steps[1]] for run in (first, second))
    assert facts["time"]["tokens_per_second"][0] > 0
    same = diff(first, first)
    assert not same["config"]
    assert not same["ledger"]
    assert all(compared["first_different"] is None for compared in same["loss"].values())
    printed = amt("diff", "runs/a", "runs/a", folder=home)
    assert "equal at all 4 steps" in printed


def test_losses_that_are_no_numbers() -> None:
    nan, inf = float("nan"), float("inf")
    assert compare({1: nan}, {1: nan}, 1e-5)["first_different"] is None
    assert compare({1: 1.0, 2: nan}, {1: 1.0, 2: 2.0}, 1e-5)["first_different"]["step"] == 2
    assert compare({1: inf}, {1: inf}, 1e-5)["largest"] == 0.0
    assert compare({1: 1.0}, {2: 1.0}, 1e-5) == {"steps": 0, "first_different": None, "largest": 0.0}


def test_the_page_as_a_file(home: Path) -> None:
    amt("watch", "runs/b", "--html", "page.html", folder=home)
    check_harmless((home / "page.html").read_text())


def test_what_notebooks_show() -> None:
    """The ledger and a report as tables; text in them is escaped."""
    ledger = Ledger()
    assert "no step has been made yet" in ledger._repr_html_()
    report = Report(SCRIPT, "tiny", [Quantity("loss", 1, 1.0, 1e-5)], findings=[SCRIPT])
    text = check_harmless(report._repr_html_()).text
    assert "differs" in text
    assert SCRIPT in text
    assert "[" not in text.replace(SCRIPT, "")
