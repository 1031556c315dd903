"""`amt inspect`: what a checkpoint, a model folder or an adapter holds, and whether it is whole.

amt inspect runs/sft/checkpoints/latest
amt inspect my-model --json
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from automodel_trainer.callbacks.console import Row, block
from automodel_trainer.callbacks.ledger_text import memory_text
from automodel_trainer.checkpoint.codec import decode
from automodel_trainer.checkpoint.sources import check_whole, is_adapter, is_checkpoint, local_folder
from automodel_trainer.checkpoint.weight_stream import header_of, progress
from automodel_trainer.models.files import check_safetensors, weight_files

Facts = dict[str, Any]
_COUNTED = ("batches_yielded", "epoch", "global_batch_size", "seed")


def inspect(source: str | os.PathLike[str]) -> Facts:
    """What is in a folder, as plain data. What is damaged is told in `health`, for which all of it is read.

    Returns:
        `kind` (checkpoint, model, adapter), `path`, `health` ("whole", or what is wrong), `weights` and, of a
        checkpoint, `step`, `epoch`, `created`, `run`, `layout`, `world_size`, `versions`, `optimizer`, `config`, …

    Raises:
        ValueError: no such folder, or nothing of the kind in it.
    """
    folder = local_folder(source)
    if not is_checkpoint(folder) and not (folder / "model").is_dir():
        return _of_model(folder)
    facts: Facts = {"kind": "checkpoint", "path": str(folder.resolve()), "health": _health(folder)}
    for name, read in _PARTS.items():
        try:
            facts |= read(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            facts[name] = f"cannot be read: {error}"
    return facts


def _health(folder: Path) -> str:
    try:
        check_whole(folder)
    except ValueError as error:
        return str(error)
    return "whole"


def _of_model(folder: Path) -> Facts:
    adapter = is_adapter(folder)
    if not adapter:
        weight_files(folder)  # an index that fits its files
    kind = "adapter" if adapter else "model"
    return {"kind": kind, "path": str(folder.resolve()), "health": "whole", "weights": weights_in(folder)}


def weights_in(folder: Path) -> Facts:
    """Files, tensors, numbers and bytes by dtype of the safetensors in a folder, and the model's class."""
    files = sorted(folder.glob("*.safetensors"))
    sizes: dict[str, int] = {}
    tensors = numbers = 0
    with progress("headers", sum(file.stat().st_size for file in files)) as advance:
        for file in files:
            check_safetensors(file)
            for dtype, shape in header_of(file).values():
                count = math.prod(shape)
                name = str(dtype).removeprefix("torch.")
                sizes[name] = sizes.get(name, 0) + count * dtype.itemsize
                tensors, numbers = tensors + 1, numbers + count
            advance(file.stat().st_size)
    facts = {"files": len(files), "tensors": tensors, "numbers": numbers, "bytes": sizes}
    for name, key in (("config.json", "architectures"), ("adapter_config.json", "base_model_name_or_path")):
        if (folder / name).is_file():
            facts[key] = json.loads((folder / name).read_text()).get(key)
    return facts


def _weights(folder: Path) -> Facts:
    return {"weights": weights_in(folder / "model")}


def _state(folder: Path) -> Facts:
    state = decode(json.loads((folder / "trainer.json").read_text()))
    lightning = state["lightning"]
    return {
        "step": lightning.get("global_step"),
        "epoch": lightning.get("epoch"),
        "world_size": state["world_size"],
        "layout": state["layout"],
        "versions": state["versions"],
        "hyperparameters": lightning.get("hyper_parameters", {}),
    }


def _manifest(folder: Path) -> Facts:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {"created": manifest["created"], "bytes": sum(entry["size"] for entry in manifest["files"].values())}


def _optimizer(folder: Path) -> Facts:
    saved = decode(json.loads((folder / "optimizer" / "groups.json").read_text()))
    groups = [group for optimizer in saved for group in optimizer["groups"]]
    facts = {
        "class": ", ".join(optimizer["optimizer"] for optimizer in saved),
        "lr": max((group["options"].get("lr", 0.0) for group in groups), default=0.0),
        "parameters": sum(len(group["parameters"]) for group in groups),
    }
    return {"optimizer": {**facts, **weights_in(folder / "optimizer")}}


def _run(folder: Path) -> Facts:
    run = {"run": str(folder.resolve().parent)}
    loaders = json.loads((folder / "rank-00000.json").read_text()).get("loaders")
    position = next((_found(loaders, key) for key in ("batches_yielded",) if _found(loaders, key) is not None), None)
    return {**run, "data": {key: _found(loaders, key) for key in _COUNTED} if position is not None else None}


def _found(value: Any, key: str) -> Any:
    """The first value of `key` anywhere inside."""
    if isinstance(value, dict) and key in value:
        return value[key]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for item in inside if (found := _found(item, key)) is not None), None)


def _config(folder: Path) -> Facts:
    file = folder / "config.yaml"
    return {"config": yaml.safe_load(file.read_text()) if file.is_file() else None}


_PARTS = {
    "step": _state,
    "created": _manifest,
    "run": _run,
    "weights": _weights,
    "optimizer": _optimizer,
    "config": _config,
}


def rows_of(facts: Facts) -> list[Row]:
    """The facts for human eyes."""
    rows = [("path", facts["path"])]
    if facts["kind"] == "checkpoint":
        rows += _checkpoint_rows(facts)
    weights = facts.get("weights")
    rows.append(("weights", _weights_text(weights) if isinstance(weights, dict) else str(weights)))
    health = facts["health"]
    return [*rows, ("health", health if health == "whole" else f"⚠ {health}")]


def _checkpoint_rows(facts: Facts) -> list[Row]:
    created = facts.get("created")
    when = datetime.fromtimestamp(created).isoformat(" ", "seconds") if isinstance(created, float) else str(created)
    size = f", {memory_text(facts['bytes'])}" if "bytes" in facts else ""
    rows = [("written", when + size), ("run", str(facts.get("run"))), ("step", _step_text(facts))]
    if "world_size" in facts:
        mesh = " × ".join(f"{name} {size}" for name, size in facts["layout"].items())
        rows.append(("layout", f"{facts['world_size']} rank(s)" + (f", {mesh}" if mesh else "")))
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())))
    data = facts.get("data")
    if isinstance(data, dict):
        rows.append(("data", ", ".join(f"{key} {value}" for key, value in data.items())))
    optimizer = facts.get("optimizer")
    if isinstance(optimizer, dict):
        held = f"{optimizer['class']}, lr {optimizer['lr']:g}, {optimizer['parameters']} parameters"
        rows.append(("optimizer", f"{held}, state {_sizes(optimizer)} in {optimizer['files']} file(s)"))
    elif optimizer is not None:
        rows.append(("optimizer", str(optimizer)))
    model = (facts.get("hyperparameters") or {}).get("model")
    if model:
        rows.append(("model from", str(model)))
    if "config" in facts:
        rows.append(("config", "config.yaml" if facts["config"] else "none: not started by amt"))
    return rows


def _step_text(facts: Facts) -> str:
    return f"{facts['step']}, epoch {facts['epoch']}" if "epoch" in facts else str(facts.get("step"))


def _weights_text(weights: Facts) -> str:
    kind = ", ".join(weights.get("architectures") or [])
    base = weights.get("base_model_name_or_path")
    kind = kind or (f"adapter of {base}" if base else "")
    counts = f"{weights['numbers']:,} numbers in {weights['tensors']} tensors, {weights['files']} file(s)"
    return f"{kind + ': ' if kind else ''}{counts}, {_sizes(weights)}"


def _sizes(facts: Facts) -> str:
    return " + ".join(f"{dtype} {memory_text(size)}" for dtype, size in facts["bytes"].items()) or "none"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exits with 1 where something is damaged."""
    parser = argparse.ArgumentParser(
        prog="amt inspect", description="Show what a checkpoint or model folder holds, and whether it is whole."
    )
    parser.add_argument("source", help="a checkpoint, or the folder or Hub id of a model or adapter")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args(argv)
    facts = inspect(args.source)
    print(json.dumps(facts, indent=2, default=str) if args.json else block(facts["kind"], rows_of(facts)))
    if facts["health"] != "whole":
        raise SystemExit(1)
