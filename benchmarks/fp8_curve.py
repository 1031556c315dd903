"""Compare the loss curves of 200 steps on real text in bf16 and in fp8.

`python benchmarks/fp8_curve.py --picture docs/fp8_curve.png` trains one model after the other on one GPU (Ada, Hopper
or later), from the same random weights and on the same packed rows of the standard library's sources. It prints the
mean of each curve over the last 20 steps. The picture needs matplotlib. `--json FILE` stores the curves and skips those
that the file has already. `--tiny` compares fp32 with bf16 on a CPU. `--emulate` trains a smaller model on a CPU and
rounds values like fp8 would.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from layouts import RandomModel, byte_tokenizer, real_text
from lightning.pytorch.callbacks import Callback

from automodel_trainer import KernelsConfig, SchedulerConfig, TextDataModule, Trainer
from automodel_trainer.models.kernels import choose as kernels

SHAPE: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "head_dim": 64}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 512}
SMALL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}


class Curve(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.norms.append(float(trainer.callback_metrics["grad_norm"]))


def train(name: str, args: argparse.Namespace, root: Path) -> Curve:
    """One loss curve. `name` is an fp8 recipe, or the precision of a run without fp8."""
    data = TextDataModule(
        str(real_text(root)),
        tokenizer=byte_tokenizer(),
        seq_len=args.seq_len,
        micro_batch_size=args.rows,
        global_batch_size=args.rows,
    )
    curve = Curve()
    trainer = Trainer(
        strategy="fsdp2",
        devices=1,
        precision=name if name in ("fp32", "bf16") else "bf16",
        max_steps=args.steps,
        log_every_n_steps=1,
        default_root_dir=str(root),
        callbacks=[curve],
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
    )
    chosen = KernelsConfig(fp8=None if name in ("fp32", "bf16") else name)
    schedule = SchedulerConfig(name="cosine", warmup_steps=20)
    shape = TINY if args.tiny else SMALL if args.emulate else SHAPE
    trainer.fit(RandomModel(shape, lr=6e-4, scheduler=schedule, kernels=chosen), data)
    return curve


def draw(curves: dict[str, list[float]], file: str) -> None:
    import matplotlib.pyplot as plt

    figure, (loss, difference) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1), constrained_layout=True
    )
    first, *others = curves
    for name, curve in curves.items():
        loss.plot(curve, label=name, linewidth=1)
    loss.set_ylabel("loss (nats a byte)")
    loss.legend()
    for name in others:
        relative = [100 * (a / b - 1) for a, b in zip(curves[name], curves[first], strict=True)]
        difference.plot(relative, label=f"{name} against {first}", linewidth=1, color=f"C{list(curves).index(name)}")
    difference.axhline(0, color="grey", linewidth=0.5)
    difference.set_ylabel("difference, %")
    difference.set_xlabel("optimizer step")
    difference.legend(loc="upper right", ncols=len(others), fontsize="small")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="*", default=["tensorwise", "rowwise"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--picture")
    parser.add_argument("--json")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--emulate", action="store_true")
    args = parser.parse_args()
    if args.emulate:
        kernels.convert_to_fp8 = functools.partial(kernels.convert_to_fp8, emulate=True)
    file = Path(args.json or Path(tempfile.mkdtemp()) / "curves.json")
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    root = Path(tempfile.mkdtemp())
    names = ("fp32", "bf16") if args.tiny else ("bf16", *args.recipes)
    for name in (name for name in names if name not in found):
        began = time.monotonic()
        curve = train(name, args, root)
        found[name] = {"loss": curve.losses, "grad_norm": curve.norms, "seconds": time.monotonic() - began}
        file.write_text(json.dumps(found))
    for name, values in found.items():
        last = values["loss"][-20:]
        print(f"{name}: {sum(last) / len(last):.4f} over the last {len(last)} steps", flush=True)
    if args.picture:
        draw({name: values["loss"] for name, values in found.items()}, args.picture)


if __name__ == "__main__":
    main()
