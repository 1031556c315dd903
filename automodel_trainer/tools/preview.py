"""`amt preview`: show the first batch of a run's configuration without training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from automodel_trainer.connect import check_sizes, choose_rows, share_tokenizer
from automodel_trainer.data import ImageTextDataModule, MicroBatchDataModule
from automodel_trainer.data.preview import preview
from automodel_trainer.lightning_cli import build
from automodel_trainer.modules import HuggingFaceModule

# A preview needs neither GPUs nor the run's own layout.
_ONE_DEVICE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]


def main(argv: Sequence[str]) -> None:
    """The command line: print the first rows, and with --html write the whole batch as a page.

    Raises:
        ValueError: the data of the configuration is not one of this project's data modules, or has pictures that
            cannot be read (`--check-pictures`).
    """
    parser = argparse.ArgumentParser(
        prog="amt preview",
        description="Show the first batch as the model sees it: trained, masked and boundary tokens.",
        epilog="All other options are those of `amt fit`: --config FILE, --data.seq_len 512, …",
    )
    parser.add_argument("--html", metavar="FILE", help="write the whole batch as an HTML page")
    parser.add_argument("--rows", type=int, default=1, help="rows to print (default: 1)")
    parser.add_argument("--check-pictures", action="store_true", help="read every picture of the data as well")
    own, rest = parser.parse_known_args(argv)
    _, module, data = build([*rest, *_ONE_DEVICE])
    if not isinstance(data, MicroBatchDataModule):
        raise ValueError(
            f"amt preview cannot show {type(data).__name__}. Use a data module of automodel_trainer, for example "
            "ChatDataModule."
        )
    if isinstance(module, HuggingFaceModule):
        share_tokenizer(module, data)
    if isinstance(module, HuggingFaceModule):
        choose_rows(module, data)
        data.prepare()
        check_sizes(module, data)
    if own.check_pictures:
        if not isinstance(data, ImageTextDataModule):
            raise ValueError(f"--check-pictures is for ImageTextDataModule, and the data are {type(data).__name__}.")
        data.check_pictures()
    batch = data.first_batch()
    preview(batch, data.load_tokenizer(), max_rows=own.rows, html=own.html, pictures_of=data.pictures_of)
