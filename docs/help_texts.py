"""Writes what `amt fit --help` prints. Run `python docs/help_texts.py` after an option or its docstring has changed."""

from __future__ import annotations

from pathlib import Path

from automodel_trainer.cli import TRAINING
from automodel_trainer.cli_help import help_text

FOLDER = Path(__file__).parent.parent / "automodel_trainer" / "help"


def main() -> None:
    for command in TRAINING:
        (FOLDER / f"{command}.txt").write_text(help_text(command), encoding="utf-8")


if __name__ == "__main__":
    main()
