"""`amt merge`: write a LoRA adapter with its base model, or the model of a checkpoint, as one model folder.

amt merge runs/lora/export --output runs/lora/merged
amt merge adapter --output merged --base org/model --dtype bfloat16
amt merge runs/sft/checkpoints/latest --output merged --dtype bfloat16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from automodel_trainer.checkpoint.merge import merge


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = arguments("amt merge", "Write a checkpoint, or an adapter and its base model, as one model.").parse_args(
        argv
    )
    print(f"Merged model in {merge_as_asked(args)}. Try it: amt generate --model {args.output}")


def arguments(program: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that `amt merge` and `amt export` share."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("source", help="a checkpoint, or the folder or Hub id of a model or a PEFT adapter")
    parser.add_argument("--output", required=True, help="the folder to write; it must not exist")
    parser.add_argument("--base", help="the folder or Hub id of the base model (default: the adapter's own)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="dtype of the weights (default: unchanged)"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", help="size of the largest weight file (default: %(default)s)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the base model")
    return parser


def merge_as_asked(args: argparse.Namespace) -> Path:
    """Call `merge` with parsed arguments, and return the folder."""
    options = {"max_shard_size": args.max_shard_size, "trust_remote_code": args.trust_remote_code}
    dtype = getattr(torch, args.dtype) if args.dtype else None
    return merge(args.source, args.output, args.base, dtype, **options)
