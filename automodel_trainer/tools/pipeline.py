"""`amt pipeline`: what a pipeline schedule looks like, and how long its ranks wait."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from automodel_trainer.strategies.pipeline.picture import html_picture, legend, schedule_facts, text_picture
from automodel_trainer.strategies.pipeline.schedule import SCHEDULES, stages_per_rank


def main(argv: Sequence[str]) -> None:
    """Prints a schedule as a text grid with its predicted bubble; `--html` writes a page for the browser."""
    parser = argparse.ArgumentParser(prog="amt pipeline", description="Draw a pipeline schedule and its bubble.")
    parser.add_argument("--schedule", default="1f1b", help=f"one of {', '.join(SCHEDULES)} or all (default 1f1b)")
    parser.add_argument("--pp", type=int, default=4, help="ranks of the pipeline (default 4)")
    parser.add_argument("--micro-batches", type=int, default=8, help="micro-batches per optimizer step (default 8)")
    parser.add_argument("--virtual-stages", type=int, help="stages per rank (default: those of the schedule)")
    parser.add_argument("--html", type=Path, help="write an HTML page to this file")
    args = parser.parse_args(list(argv))
    pages = []
    for name in SCHEDULES if args.schedule == "all" else [args.schedule]:
        per_rank = stages_per_rank(name, args.virtual_stages if args.schedule != "all" else None)
        timed, bubble = schedule_facts(name, args.pp, per_rank, args.micro_batches)
        title = (
            f"{name}: {args.pp} ranks × {per_rank} stage(s), {args.micro_batches} micro-batches, "
            f"predicted bubble {bubble:.1%}"
        )
        print(title)
        for rank, line in enumerate(text_picture(timed)):
            print(f"  rank {rank}  {line}")
        print(f"  {legend(timed)}\n")
        pages.append(html_picture(timed, title))
    if args.html:
        args.html.write_text("\n".join(pages))
        print(f"wrote {args.html}")
