"""The page that asks for GPUs, model and goal, and gives the YAML of a run. Every answer is computed here."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from memory import GIB, Shape, needed

# Shapes of well-known models, from their configs.
MODELS = {
    "Qwen/Qwen3-0.6B": Shape(1024, 28, 2048, 1024, 3072, 151936, tied=True, normed=3072),
    "meta-llama/Llama-3.2-1B": Shape(2048, 16, 2048, 512, 8192, 128256, tied=True),
    "Qwen/Qwen3-4B": Shape(2560, 36, 4096, 1024, 9728, 151936, tied=True, normed=5120),
    "google/gemma-3-4b-it": Shape(2560, 34, 2048, 1024, 10240, 262208, tied=True, normed=5632),
    "meta-llama/Llama-3.1-8B": Shape(4096, 32, 4096, 1024, 14336, 128256),
    "Qwen/Qwen3-8B": Shape(4096, 36, 4096, 1024, 12288, 151936, normed=5120),
    "Qwen/Qwen3-VL-8B-Instruct": Shape(4096, 36, 4096, 1024, 12288, 151936, normed=5120),
    "Qwen/Qwen3-14B": Shape(5120, 40, 5120, 1024, 17408, 151936, normed=6144),
    "openai/gpt-oss-20b": Shape(2880, 24, 4096, 512, 2880, 201088, experts=32, chosen=4),
    "Qwen/Qwen3-30B-A3B": Shape(2048, 48, 4096, 512, 768, 151936, experts=128, chosen=8, normed=4608),
    "Qwen/Qwen3-32B": Shape(5120, 64, 8192, 1024, 25600, 151936, normed=9216),
    "meta-llama/Llama-3.1-70B": Shape(8192, 80, 8192, 1024, 28672, 128256),
}
# Parameters of towers for pictures, which are frozen; what they keep of pictures comes on top and is not counted.
TOWERS = {"google/gemma-3-4b-it": 0.42e9, "Qwen/Qwen3-VL-8B-Instruct": 0.58e9}
GOALS = {
    "lora": "fine-tune adapters (LoRA)",
    "qlora": "fine-tune adapters on 4-bit weights (QLoRA)",
    "full": "fine-tune all parameters",
    "pretrain": "pre-train on raw text",
}
GPUS = (1, 2, 4, 8, 16, 32)
MEMORY = (24, 48, 80, 141)  # GiB of a GPU
LENGTHS = (2048, 8192, 32768, 131072)
A_NODE = 8
USABLE = 0.92  # of the memory; the rest is the CUDA context, and what lies between blocks of the allocator
MOST_TOKENS = 16384  # of a micro-batch; more gains no speed

Plan = tuple[str, int, float]  # strategy, rows of a micro-batch, GiB


def plan(model: str, goal: str, gpus: int, memory: int, length: int) -> Plan | None:
    """The first layout that fits, from the fastest to the smallest; None if none does."""
    for cp in (size for size in (1, 2, 4, 8) if size <= min(gpus, A_NODE)):
        for recompute in (False, True):
            if cp > 1 and not recompute:
                continue
            rows = 1
            size = _gib(model, goal, gpus, memory, length // cp, recompute)
            if size > USABLE * memory:
                continue
            while cp == 1 and 2 * rows * length <= MOST_TOKENS:
                more = _gib(model, goal, gpus, memory, 2 * rows * length, recompute)
                if more > USABLE * memory:
                    break
                rows, size = 2 * rows, more
            return _strategy(model, goal, gpus, cp, recompute), rows, round(size, 1)
    return None


def _gib(model: str, goal: str, gpus: int, memory: int, tokens: int, recompute: bool) -> float:
    kind = "full" if goal == "pretrain" else goal
    tower = 2 * TOWERS.get(model, 0) / gpus / GIB
    return sum(needed(MODELS[model], kind, gpus, tokens, recompute=recompute, memory=memory).values()) + tower


def _strategy(model: str, goal: str, gpus: int, cp: int, recompute: bool) -> str:
    options = [f"cp={cp}"] if cp > 1 else []
    if MODELS[model].experts > 1 and gpus > 1 and goal != "qlora":
        options.append(f"ep={min(gpus, A_NODE)}")
    if recompute:
        options.append("activation_checkpointing=full")
    return "fsdp2" + (":" + ",".join(options) if options else "")


def yaml_of(model: str, goal: str, gpus: int, memory: int, length: int) -> str:
    """The YAML of an answer.

    Raises:
        ValueError: nothing fits.
    """
    found = plan(model, goal, gpus, memory, length)
    if found is None:
        raise ValueError(f"{model} ({goal}) does not fit on {gpus} × {memory} GiB with rows of {length} tokens.")
    values = {"MODEL": model, "STRATEGY": found[0], "ROWS": found[1], "LENGTH": length}
    values |= {"DEVICES": min(gpus, A_NODE), "NODES": max(1, gpus // A_NODE), "BATCH": batch(gpus, found[1])}
    text = TEMPLATES[goal]
    for name, value in values.items():
        text = text.replace(f"<{name}>", str(value))
    return text


def batch(gpus: int, rows: int) -> int:
    """Rows of a step: at least 32, and two micro-batches on every GPU."""
    return max(32, 2 * gpus * rows)


TRAINER = """trainer:
  strategy: <STRATEGY>
  devices: <DEVICES>
  num_nodes: <NODES>
  precision: bf16
"""
CHATS = """data:
  train: chats.jsonl
  val_split: 0.02
  seq_len: <LENGTH>
  micro_batch_size: <ROWS>
  global_batch_size: <BATCH>
"""
ADAPTERS = (
    "  max_epochs: 3\n  default_root_dir: runs/lora\nmodel:\n  model: <MODEL>\n  lr: 2.0e-4\n  lora:\n    rank: 16\n"
)
TEMPLATES = {
    "lora": TRAINER + ADAPTERS + CHATS,
    "qlora": TRAINER + ADAPTERS + "    quantize: nf4\n" + CHATS,
    "full": TRAINER + "  max_epochs: 3\n  default_root_dir: runs/sft\nmodel:\n  model: <MODEL>\n  lr: 2.0e-5\n" + CHATS,
    "pretrain": TRAINER
    + """  max_steps: 10000
  default_root_dir: runs/pretrain
model:
  model: <MODEL>
  lr: 3.0e-4
  scheduler:
    name: wsd
    warmup_steps: 200
data:
  class_path: automodel_trainer.TextDataModule
  init_args:
    train: corpus.jsonl
    seq_len: <LENGTH>
    micro_batch_size: <ROWS>
    global_batch_size: <BATCH>
""",
}


def answers() -> dict[str, Plan | None]:
    """Every answer, by `model|goal|gpus|memory|length`."""
    questions = product(MODELS, GOALS, GPUS, MEMORY, LENGTHS)
    return {"|".join(map(str, question)): plan(*question) for question in questions}


def page() -> str:
    """The page, as Markdown with a form in it."""
    models = {name: f"{name} ({shape.parameters / 1e9:.1f} billion)" for name, shape in MODELS.items()}
    menus = [
        _menu("model", "Model", models, "meta-llama/Llama-3.1-8B"),
        _menu("goal", "Goal", GOALS, "lora"),
        _menu("gpus", "GPUs", {str(n): str(n) for n in GPUS}, "1"),
        _menu("memory", "Memory of each", {str(n): f"{n} GiB" for n in MEMORY}, "80"),
        _menu("length", "Tokens of a row", {str(n): f"{n:,}" for n in LENGTHS}, "2048"),
    ]
    data = json.dumps({"answers": answers(), "templates": TEMPLATES, "node": A_NODE}, separators=(",", ":"))
    text = (Path(__file__).parent / "choose_page.md").read_text(encoding="utf-8")
    text = text.replace("TABLE", "\n".join(table(gpus) for gpus in (1, 8)))
    return text.replace("MENUS", "\n".join(menus)).replace("DATA", data.replace("</", "<\\/"))


def table(gpus: int, length: int = 2048) -> str:
    """The most that fits for each model and size of GPU, as a Markdown table.

    Args:
        gpus: how many share the model.
        length: tokens of a row.
    """
    goals = {"full": "all", "lora": "LoRA", "qlora": "QLoRA"}
    lines = [f"| on {gpus} × | " + " | ".join(f"{size} GiB" for size in MEMORY) + " |", "| --- " * 5 + "|"]
    for model in MODELS:
        cells = []
        for size in MEMORY:
            fits = ((words, plan(model, goal, gpus, size, length)) for goal, words in goals.items())
            best = next(((words, found) for words, found in fits if found is not None), None)
            cells.append("–" if best is None else f"{best[0]}{', recomputed' if 'full' in best[1][0] else ''}")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def memory_lines(model: str, length: int = 2048) -> list[str]:
    """What fits on one GPU and on eight, a line for each size of GPU, for the head of a YAML file."""
    lines = [f"# Estimated (docs/site/memory.py), rows of {length:,} tokens:"]
    for size in MEMORY:
        cells = [f"{words} {_most(model, gpus, size, length)}" for gpus, words in ((1, "one:"), (8, "eight:"))]
        lines.append(f"#   GPUs of {size} GiB  " + "; ".join(cells))
    return lines


def _most(model: str, gpus: int, memory: int, length: int) -> str:
    """The most that fits: all parameters, adapters, or adapters on 4 bits."""
    for goal, words in (("full", "all parameters"), ("lora", "LoRA"), ("qlora", "QLoRA")):
        if (found := plan(model, goal, gpus, memory, length)) is not None:
            strategy, rows, gib = found
            again = ", recomputed" if "activation_checkpointing" in strategy else ""
            return f"{words}, {rows} row{'s' * (rows > 1)}{again}, {gib} GiB"
    return "nothing fits"


def _menu(name: str, label: str, options: dict[str, str], chosen: str) -> str:
    items = "".join(
        f'<option value="{value}"{" selected" if value == chosen else ""}>{text}</option>'
        for value, text in options.items()
    )
    return f'<label>{label}<select id="choose-{name}">{items}</select></label>'
