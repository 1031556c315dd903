"""`amt convert`: the weights of a Lightning `.ckpt` as safetensors. The file is read in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from automodel_trainer.checkpoint.record import write_safetensors
from automodel_trainer.checkpoint.writable import check_folder
from automodel_trainer.models.files import WEIGHTS_NAME
from automodel_trainer.nn.text import listed

# It knows torch and safetensors alone, so nothing that another package allows can be unpickled.
_READER = """
import sys, json, torch
from safetensors.torch import save_file
content = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
state = content.get("state_dict", content) if isinstance(content, dict) else {}
weights = {str(k): v.detach().clone().contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}
if not weights:
    sys.exit("it holds no state_dict")
save_file(weights, sys.argv[2], metadata={"format": "pt"})
print(json.dumps({"step": content.get("global_step"), "epoch": content.get("epoch")}))
"""


def convert(file: Path, output: Path, prefix: str = "", config: Path | None = None) -> dict[str, int]:
    """Write the weights in a Lightning checkpoint as `model.safetensors`.

    Args:
        file: the `.ckpt` file. It is not trusted: torch reads it with `weights_only=True` in a process of its own.
        output: the folder to write; it must not exist.
        prefix: beginning of names to take away, such as "model."; weights with other names are an error.
        config: a model folder whose config and tokenizer are copied, so that the result is a Hugging Face folder.

    Returns:
        numbers of tensors and elements.

    Raises:
        ValueError: the file holds other objects than tensors and plain data, or none; or names do not have the prefix.
    """
    if not file.is_file():
        raise ValueError(f"{file} is not a file. amt convert takes a .ckpt of Lightning's Trainer.")
    if output.exists():
        raise ValueError(f"{output} exists already. Give --output another name, or remove it.")
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / WEIGHTS_NAME
        command = [sys.executable, "-I", "-c", _READER, str(file.absolute()), str(found)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place, env={"PATH": os.environ["PATH"]})
        if done.returncode:
            reason = done.stderr.strip().splitlines() or ["unknown"]
            raise ValueError(
                f"{file} cannot be converted: {_reason(reason)} Only tensors and plain data are read. Load the "
                "file where it was made and save its weights: torch.save({'state_dict': ckpt['state_dict']}, FILE)."
            )
        return _write(found, output, prefix, config)


def _reason(lines: list[str]) -> str:
    """The line of torch's message that names what it refused."""
    named = next((line for line in lines if "Unsupported global" in line or "GLOBAL" in line), lines[-1])
    return " ".join(named.split()).rstrip(".") + "."


def _write(found: Path, output: Path, prefix: str, config: Path | None) -> dict[str, int]:
    from safetensors.torch import load_file

    weights = load_file(found)
    others = [name for name in weights if not name.startswith(prefix)]
    if others:
        raise ValueError(
            f"--prefix {prefix!r}: {listed(others)} do not begin so. Leave --prefix out, or give what all begin with."
        )
    check_folder(output, "The model")
    output.mkdir(parents=True)
    if config is not None:
        for path in config.iterdir():
            if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja") and "index" not in path.name:
                shutil.copy(path, output / path.name)
    write_safetensors(
        output / WEIGHTS_NAME, {name.removeprefix(prefix): t for name, t in weights.items()}, {"format": "pt"}
    )
    return {"tensors": len(weights), "elements": sum(tensor.numel() for tensor in weights.values())}


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="amt convert", description=__doc__)
    parser.add_argument("file", type=Path, metavar="CKPT", help="a .ckpt file of Lightning's Trainer")
    parser.add_argument("--output", type=Path, default=None, help="the folder to write; by default CKPT without .ckpt")
    parser.add_argument("--prefix", default="", help="beginning of the weights' names to take away, such as 'model.'")
    parser.add_argument("--config", type=Path, help="a model folder whose config and tokenizer are copied")
    options = parser.parse_args(argv)
    output = options.output or options.file.with_suffix("")
    numbers = convert(options.file, output, options.prefix, options.config)
    print(json.dumps({"output": str(output), **numbers}))
