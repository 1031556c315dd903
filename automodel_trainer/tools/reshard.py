"""`amt reshard`: write weights as another number of files.

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

    One tensor is in memory at a time. If the source is a checkpoint, the result is one, too, and training can resume
    from it. Its optimizer state is copied, because any number of ranks can read it.

    Args:
        source: a checkpoint, or the folder or Hub id of a model.
        output: the folder to write. It appears when it is complete.
        shards: number of weight files.

    Returns:
        The folder.

    Raises:
        ValueError: the source is damaged or is an adapter (which is one file), there are more shards than tensors, or
            `output` exists.
    """
    folder, inside, output = local_folder(source), model_folder(source), Path(output)
    if is_adapter(inside):
        raise ValueError(
            f"{source} holds a LoRA adapter, which is always one file, so there is nothing to reshard. Give a model or "
            "a checkpoint of one."
        )
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
    """The files to copy: all except weights, their index, the manifest, and hidden files."""
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
