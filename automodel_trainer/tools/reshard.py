"""`amt reshard`: the same weights in another number of files.

amt reshard runs/sft/checkpoints/latest --output resharded --shards 8
amt reshard my-model --output my-model-in-one-file --shards 1
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from automodel_trainer.checkpoint.folder import publish
from automodel_trainer.checkpoint.sources import is_adapter, is_checkpoint, local_folder, model_folder, new_folder
from automodel_trainer.checkpoint.weight_stream import Weights, write_stream
from automodel_trainer.models.sidecars import is_weight_file


def reshard(source: str | os.PathLike[str], output: str | os.PathLike[str], shards: int) -> Path:
    """Write the weights of a checkpoint or model folder as `shards` files of about the same size. Nothing else changes.

    One tensor is in memory at a time. Of a checkpoint the result is a checkpoint, from which training goes on as from
    the first; its optimizer state, which is in shards that any number of ranks reads, is copied.

    Args:
        source: a checkpoint, or the folder or Hub id of a model.
        output: the folder to write; it appears when it is whole.
        shards: how many files.

    Raises:
        ValueError: a damaged source, an adapter (which is one file), more shards than tensors, or `output` exists.
    """
    folder, inside, output = local_folder(source), model_folder(source), Path(output)
    if is_adapter(inside):
        raise ValueError(f"{source} holds a LoRA adapter, which is always one file: there is nothing to reshard.")
    with new_folder(output) as target:
        model = target / inside.relative_to(folder)
        model.mkdir(exist_ok=True)
        write_stream(Weights(inside), model, shards=shards, title="resharding")
        for file in _others(folder, inside):
            place = target / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
        if is_checkpoint(folder):
            publish(target, output, {})
    return output


def _others(folder: Path, inside: Path) -> list[Path]:
    """Files that are copied: all but the weights, what lists files, and what is hidden."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json")
    shown = [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
    return [file for file in shown if file.parent != inside or not is_weight_file(file)]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="amt reshard", description="Write the same weights as another number of files."
    )
    parser.add_argument("source", help="a checkpoint, or the folder or Hub id of a model")
    parser.add_argument("--output", required=True, help="the folder to write; it must not exist")
    parser.add_argument("--shards", type=int, required=True, help="the number of weight files")
    args = parser.parse_args(argv)
    folder = reshard(args.source, args.output, args.shards)
    print(f"{args.shards} weight file(s) in {folder}.")
