"""What runs on 8 to 1,024 GPUs need, on paper. `python docs/scale.py` prints tables and writes them to docs/scale.md.

Memory is that of the page that chooses (`docs/site/memory.py`), which is compared with measured peaks. Everything else
is a size divided by a rate. Rates that were measured say where; those that were not are `ASSUMED`.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "site"))

from choose import A_NODE, MODELS, USABLE
from memory import GIB, Shape, needed

PAGE = Path(__file__).with_name("scale.md")
MEMORY = 141 * 1e9 / GIB  # of an H200
TOKENS = 8192  # of a micro-batch on one GPU
GPUS = (8, 64, 256, 1024)

# Two GPUs over NVLink: half of 8,192 × 8 rows of 2,048 in bf16 cross in 0.52 ms (`all_to_all`, combine).
NVLINK = 8192 * 8 * 2048 * 2 / 2 / 0.52e-3
# One GPU's share of a save to a virtual disk: 17.98 GB in 39.9 s. Loading safetensors: 4.55 GB/s.
SAVE, LOAD = 17.98e9 / 39.9, 4.55e9
# ASSUMED: one network card of 400 Gbit/s for each GPU, four fifths of it used; time of a ring from one GPU to the next.
CARD, HOP = 40e9, 5e-6

SHAPES = {
    "8B": MODELS["meta-llama/Llama-3.1-8B"],
    "70B": MODELS["meta-llama/Llama-3.1-70B"],
    "30B-A3B": MODELS["Qwen/Qwen3-30B-A3B"],
    # Width of queries and keys stands for latent attention; the shared expert is one more that all tokens take. Its
    # three plain blocks are left out.
    "671B": Shape(7168, 58, 12288, 768, 2048, 129280, experts=257, chosen=9),
}


def flops(shape: Shape, length: int) -> float:
    """Of a token's forward pass, in rows of one document. Causal attention: half of all pairs, two matmuls."""
    active = shape.layers * replace(shape, experts=shape.chosen).block + shape.hidden * shape.vocabulary
    return 2 * (active + shape.layers * shape.queries * length)


# Useful FLOP/s of H200s in training, by benchmarks/RESULTS.md: 8B on two, and six blocks of 30B-A3B on one.
DENSE = 10_019 * 3 * flops(SHAPES["8B"], 8192)
MIXTURE = 69_412 * 3 * flops(replace(SHAPES["30B-A3B"], layers=6), 4096)


@dataclass(frozen=True)
class Layout:
    """How ranks are divided; sizes multiply with the number that share weights to all ranks.

    Attributes:
        name: as in `strategy=`, with N for the number of nodes.
        hsdp: replicas are nodes.
        tp, ep, pp: sizes.
    """

    name: str
    hsdp: bool = False
    tp: int = 1
    ep: int = 1
    pp: int = 1


FSDP, HSDP = Layout("fsdp2"), Layout("hsdp:dp_replicate=N", hsdp=True)
LAYOUTS = {
    "8B": (FSDP, HSDP),
    "70B": (FSDP, Layout("fsdp2:tp=8", tp=8), Layout("3d:pp=4", pp=4)),
    "30B-A3B": (FSDP, HSDP, Layout("fsdp2:ep=8", ep=8)),
    "671B": (FSDP, Layout("fsdp2:ep=8", ep=8), Layout("fsdp2:ep=64", ep=64)),
}


def memory(shape: Shape, layout: Layout, gpus: int) -> float:
    """GiB on each GPU of all parameters in fp32 with Adam, bf16 compute, whole blocks recomputed."""
    sharing = A_NODE if layout.hsdp else gpus
    parts = needed(shape, "full", sharing, TOKENS, recompute=True)
    if layout.ep > 1:  # two blocks are gathered at a time, but of the experts only this rank's
        parts["other"] -= 4 * (shape.block - _a_rank_s(shape, layout).block) / GIB
    # Under pp the first stage holds as many micro-batches as there are stages, of as many times fewer blocks.
    if layout.tp > 1:
        parts["activations"], parts["other"] = parts["activations"] / layout.tp, parts["other"] / layout.tp + 0.5
    return sum(parts.values())


def _a_rank_s(shape: Shape, layout: Layout) -> Shape:
    return replace(shape, experts=max(1, shape.experts // layout.ep))


def compute(shape: Shape, layout: Layout) -> float:
    """Seconds of a micro-batch with recomputation, on one GPU, without communication."""
    rate = MIXTURE if shape.experts > 1 else DENSE
    return 4 * flops(shape, TOKENS) * TOKENS / rate / (layout.tp * layout.pp)  # forward, again, twice backward


def _ring(size: float, ranks: int) -> float:
    """Seconds to gather or scatter `size` bytes over a ring; all cards of a node carry it to the next node."""
    rate = NVLINK if ranks <= A_NODE else min(NVLINK, A_NODE * CARD)
    return size * (ranks - 1) / ranks / rate + (ranks - 1) * HOP


def communication(shape: Shape, layout: Layout, gpus: int) -> float:
    """Seconds of a micro-batch: two gathers of bf16 weights, gradients reduced in fp32, and what the layout adds."""
    ranks = gpus // (layout.tp * layout.pp)
    sharing = A_NODE if layout.hsdp else ranks
    share = _a_rank_s(shape, layout).block / (layout.tp)
    plain = replace(shape, experts=1).block if layout.ep > 1 else 0
    layers = shape.layers // layout.pp
    seconds = 0.0
    if layout.ep > 1:
        seconds += layers * _block(plain, sharing) + layers * _block(share - plain, max(1, sharing // layout.ep))
        rows = shape.chosen * TOKENS * shape.hidden * 2 * (layout.ep - 1) / layout.ep
        # There and back: forward, again, backward.
        seconds += layers * 6 * rows / (NVLINK if layout.ep <= A_NODE else CARD)
    else:
        seconds += layers * _block(share, sharing)
    if layout.hsdp and gpus > A_NODE:  # each GPU reduces its share of the gradients with its twins
        nodes = gpus // A_NODE
        seconds += 2 * 4 * shape.parameters / A_NODE * (nodes - 1) / nodes / CARD + 2 * (nodes - 1) * HOP
    if layout.tp > 1:
        seconds += layers * 6 * 2 * _ring(2 * TOKENS * shape.hidden, layout.tp)
    return seconds


def _block(parameters: float, ranks: int) -> float:
    if ranks == 1:
        return 0.0
    return 2 * _ring(2 * parameters, ranks) + _ring(4 * parameters, ranks)


def rows(name: str) -> list[str]:
    """The table of a model."""
    shape = SHAPES[name]
    lines = [
        "| layout | GPUs | GiB a GPU | compute | communication | least rows of 8,192 a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for layout in LAYOUTS[name]:
        for gpus in GPUS:
            if gpus < max(layout.tp * layout.pp, layout.ep):
                continue
            size = memory(shape, layout, gpus)
            fits = "" if size <= USABLE * MEMORY else " **no**"
            work, wait = compute(shape, layout), communication(shape, layout, gpus)
            least = gpus // layout.tp
            lines.append(
                f"| `{layout.name}` | {gpus:,} | {size:,.0f}{fits} | {work:.2f} s | {wait:.2f} s | {least:,} |"
            )
    return lines


def checkpoints() -> list[str]:
    """What a checkpoint takes: fp32 weights and two moments, every rank its share."""
    lines = [
        "| model | checkpoint | " + " | ".join(f"{gpus:,} GPUs" for gpus in GPUS) + " | 60 s needs |",
        "| --- | --- | " + "--- | " * len(GPUS) + "--- |",
    ]
    for name, shape in SHAPES.items():
        size = 12 * shape.parameters
        each = " | ".join(f"{size / gpus / SAVE:,.0f} s ({gpus * SAVE / 1e9:,.0f} GB/s)" for gpus in GPUS)
        lines.append(f"| {name} | {size / 1e12:.2f} TB | {each} | {size / 60e9:,.1f} GB/s |")
    return lines


def starts() -> list[str]:
    """Who reads which bytes of a bf16 model at the start."""
    ranks = max(GPUS)
    lines = [
        f"| model | files | `fsdp2`: a rank of {ranks:,} | all | `hsdp`: a rank | all | at one disk's rate |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, shape in SHAPES.items():
        files = 2 * shape.parameters
        replicas = files * ranks / A_NODE
        once = f"{files / ranks / 1e9:.2f} GB | {files / 1e9:,.0f} GB"
        often = f"{files / A_NODE / 1e9:,.1f} GB | {replicas / 1e12:,.1f} TB"
        rate = f"{files / LOAD:,.0f} s, {replicas / LOAD / 3600:,.1f} h"
        lines.append(f"| {name} | {files / 1e9:,.0f} GB | {once} | {often} | {rate} |")
    return lines


def tables() -> dict[str, list[str]]:
    """All tables of the page, by the name in its comments."""
    return {**{name: rows(name) for name in SHAPES}, "checkpoints": checkpoints(), "starts": starts()}


def filled(text: str) -> str:
    """The page with its tables as they are computed now."""
    for name, lines in tables().items():
        block = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert block.search(text), name
        text = block.sub(lambda found, lines=lines: found[1] + "\n".join(lines) + "\n" + found[2], text)
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for title, table in tables().items():
        print(f"\n{title}", *table, sep="\n")
