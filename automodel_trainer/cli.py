"""`amt`: Lightning's CLI for this project's Trainer, and the tools. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from automodel_trainer.imports import importing, say_what_compiles_again
from automodel_trainer.tools.errors import explain_errors

USAGE = """\
usage: amt COMMAND [options]

Train and use Hugging Face models on any layout of devices.

training (takes options from --config FILE.yaml and from the command line; amt COMMAND --help lists them)
  fit        train a model
  validate   evaluate on the validation data
  test       evaluate on the test data
  predict    compute the log-probability of every supervised token

tools
  bench      measure the training steps of a configuration: tokens per second, MFU, memory, the largest kernels
  preview    show the first batch as the model sees it: trained, masked and boundary tokens
  generate   answer prompts with a model folder
  convert    write the weights of a Lightning .ckpt as safetensors; nothing in it is run
  diff       show where two runs part: configuration, data, loss, time
  export     write a checkpoint as a Hugging Face folder; --check compares it with the source
  inspect    show what a checkpoint or model folder holds, and whether it is whole
  launch     write a file for Slurm, Kubernetes, SkyPilot or torchrun
  merge      write a LoRA adapter and its base model, or the shards of a checkpoint, as one model
  pipeline   draw a pipeline schedule and its bubble
  reshard    write the same weights as another number of files
  tokenize   write raw text as shards of tokens, on all cores
  verify     compare a layout with one device, on a small copy of your model and your data
  watch      look at a run in a browser: curves, first batch, ledger, checkpoints

  amt fit --model org/name --data chats.jsonl --lora 16
  amt fit --config configs/quickstart.yaml
  amt fit --config configs/sft.yaml --trainer.strategy fsdp2 --trainer.devices 4
  amt fit --config configs/sft.yaml --on ray --workers 8
  amt preview --config configs/quickstart.yaml --html batch.html
  amt verify --config configs/sft.yaml --strategy fsdp2_tp:tp=2
"""

TRAINING = ("fit", "validate", "test", "predict")
"""The commands of Lightning's CLI."""

TOOLS = {
    "bench": "automodel_trainer.tools.bench",
    "convert": "automodel_trainer.tools.convert",
    "diff": "automodel_trainer.tools.watch.diff",
    "export": "automodel_trainer.tools.export",
    "generate": "automodel_trainer.tools.generate",
    "inspect": "automodel_trainer.tools.inspect",
    "launch": "automodel_trainer.tools.launch.command",
    "merge": "automodel_trainer.tools.merge",
    "pipeline": "automodel_trainer.tools.pipeline",
    "preview": "automodel_trainer.tools.preview",
    "reshard": "automodel_trainer.tools.reshard",
    "tokenize": "automodel_trainer.tools.tokenize",
    "verify": "automodel_trainer.tools.verify",
    "watch": "automodel_trainer.tools.watch.server",
}
"""Maps the other commands to the modules whose `main` runs them."""


def main(argv: list[str] | None = None) -> None:
    """Run one command; exits with 2 on a usage error, 1 on an error that says what to do, 75 to be requeued."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
    elif command == "--version":
        print(_version())
    elif command in TRAINING and {"-h", "--help"} & set(argv):
        print(_help(command), end="")
    elif command in TRAINING:
        explain_errors(lambda: _train(argv))
    elif command in TOOLS:
        explain_errors(lambda: import_module(TOOLS[command]).main(argv[1:]))
    else:
        _unknown(command)


def _train(argv: list[str]) -> None:
    from automodel_trainer.tools.fit_on import fit_on, take

    on, workers, rest = take(argv)
    if on is not None:
        code = fit_on(on, workers, rest)
    else:
        say_what_compiles_again("torch")
        with importing():
            from automodel_trainer.lightning_cli import run
        code = run(argv).trainer.exit_code
    if code:
        raise SystemExit(code)


def _help(command: str) -> str:
    """The help, which `docs/help_texts.py` wrote: to make it takes the imports of a whole training."""
    return Path(__file__).with_name("help").joinpath(f"{command}.txt").read_text(encoding="utf-8")


def _version() -> str:
    from importlib.metadata import version

    return f"automodel-trainer {version('automodel-trainer')}"


def _unknown(command: str) -> None:
    import difflib

    known = [*TRAINING, *TOOLS]
    hint = difflib.get_close_matches(command, known, n=1)
    nearest = f" Did you mean {hint[0]!r}?" if hint else ""
    print(f"amt: {command!r} is not a command.{nearest} Allowed: {', '.join(known)}.", file=sys.stderr)
    raise SystemExit(2)
