"""Write the table of docs/pipeline.md: layouts × schedules × ties and LoRA × families, against plain torch.

python docs/pipeline_matrix.py                            # about ten minutes on two cores; 8 gloo ranks
python docs/pipeline_matrix.py --file F --minutes 5       # stops early with exit code 3; run it again to continue
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests

from tests.harness import relative_error
from tests.pool import RankPool
from tests.strategies.pipeline_runs import reference, train

LAYOUTS = [
    ("pp=2", 2),
    ("pp=4", 4),
    ("pp=2,dp_shard=2", 4),
    ("pp=2,tp=2", 4),
    ("pp=2,cp=2", 4),
    ("pp=2,tp=2,dp_shard=2", 8),
]
SCHEDULES = ["1f1b", "interleaved_1f1b", "zbv"]
FAMILIES = ["llama", "qwen3", "gemma3_text", "phi3"]
KINDS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "LoRA": {"tie_word_embeddings": True, "lora": True},
}
COLUMNS = {f"{family}, {kind}": (family, options) for family in FAMILIES for kind, options in KINDS.items()}
UNFINISHED = 3
# "gradients" are the first step's, where both sides have the same weights. Later ones are taken at weights that Adam
# has moved by the signs of what is next to nothing; the losses and the last weights hold those steps.
ALLOWED = {"loss": 1e-5, "gradients": 1e-4, "weights": 1e-4}
START, END = "<!-- table -->", "<!-- end of table -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="keep results here, and continue from those that are there")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time, with exit code 3")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    warnings.simplefilter("ignore")
    made: dict[str, str] = json.loads(args.file.read_text()) if args.file and args.file.is_file() else {}
    references: dict[tuple[str, int], Any] = {}
    pool = RankPool(8)
    for (layout, ranks), schedule, (column, (family, options)) in product(LAYOUTS, SCHEDULES, COLUMNS.items()):
        key = name_of(layout, schedule, column)
        if key in made:
            continue
        if time.monotonic() > end:
            break
        depth = 8 if "pp=4" in layout else 4  # two layers a stage, or one with two stages a rank
        sized = {**options, "num_hidden_layers": depth}
        if (column, depth) not in references:
            references[column, depth] = reference(family, **sized)
        made[key] = cell(pool, f"3d:{layout},schedule={schedule}", ranks, family, sized, references[column, depth])
        print(f"{key}: {made[key]}", flush=True)
        if args.file:
            args.file.write_text(json.dumps(made, indent=0))
    pool.close()
    write_table(made)
    wrong = [key for key, text in made.items() if text.startswith("**")]
    print(f"{len(made)} cells; out of bounds: {wrong or 'none'}")
    complete = len(made) == len(LAYOUTS) * len(SCHEDULES) * len(COLUMNS)
    sys.exit(int(bool(wrong)) if complete else UNFINISHED)


def name_of(layout: str, schedule: str, column: str) -> str:
    return f"{layout}, {schedule}, {column}"


def write_table(made: dict[str, str]) -> None:
    lines = [f"| layout | schedule | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for (layout, _), schedule in product(LAYOUTS, SCHEDULES):
        cells = (made.get(name_of(layout, schedule, column), "not run") for column in COLUMNS)
        lines.append(f"| `{layout}` | `{schedule}` | {' | '.join(cells)} |")
    page = Path(__file__).with_name("pipeline.md")
    before, _, rest = page.read_text().partition(START)
    page.write_text(before + START + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


def cell(pool: RankPool, spec: str, ranks: int, family: str, options: dict[str, Any], expected: Any) -> str:
    """The largest relative error of a gradient in any step; bold where anything is more than allowed."""
    try:
        results = pool.run(ranks, train, spec, ranks, family, **options)
    except AssertionError as error:
        return f"**fails: {str(error).strip().splitlines()[-1][:60]}**"
    errors, largest = {"loss": 0.0, "gradients": 0.0, "weights": 0.0}, 0.0
    complete = {name for result in results for name in result["weights"]} == expected["weights"].keys()
    for result in results:
        for step, (got, want) in enumerate(zip(result["history"], expected["history"], strict=True)):
            errors["loss"] = max(errors["loss"], abs(got["loss"] / want["loss"] - 1))
            gradients = [relative_error(g, want["gradients"][name]) for name, g in got["gradients"].items()]
            largest = max(largest, *gradients)
            if step == 0:
                errors["gradients"] = max(errors["gradients"], *gradients)
        for name, weight in result["weights"].items():
            errors["weights"] = max(errors["weights"], relative_error(weight, expected["weights"][name]))
    right = complete and all(error <= ALLOWED[name] for name, error in errors.items())
    text = f"{largest:.0e}"
    return text if right else f"**{text}**"


if __name__ == "__main__":
    main()
