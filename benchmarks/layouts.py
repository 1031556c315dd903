"""Compare loss curves and speed of a llama-8B-shaped model on 2 GPUs under several layouts, on real text.

`python benchmarks/layouts.py` runs each case in its own processes and prints a line for each. `--tiny` makes the model
small enough for CPU ranks. `--cases fsdp2 tp` chooses cases. `--long 32768 65536` trains one document of each length
with cp=2, until one fails; `--methods ulysses ring` compares the two ways to exchange attention (`tokens_per_second`).
The optimizer state exists before the first of the `--long-steps`. With a single step, the time includes compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cases import report, result_of
from lightning.pytorch.callbacks import Callback
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from automodel_trainer import (
    AutoModelForCausalLM,
    CausalLMModule,
    MockDataModule,
    SchedulerConfig,
    TextDataModule,
    Trainer,
)
from automodel_trainer.callbacks import Throughput
from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.nn.deferred_logits import defer_logits

EIGHT_B: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
EIGHT_B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5}
TINY: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "rope_theta": 5e5}
CASES = {
    "fsdp2": "fsdp2",
    "fsdp2, eager": "fsdp2:compile=false",
    "tp": "fsdp2:tp=2",
    "tp, async": "fsdp2:tp=2,async_tp=true",
    "tp, eager": "fsdp2:tp=2,compile=false",
    "cp": "fsdp2:cp=2",
    "cp, ring": "fsdp2:cp=2,cp_attention=ring",
}


class RandomModel(CausalLMModule):
    """A model with random weights that are the same under every layout."""

    def __init__(self, shape: dict[str, Any], **kwargs: Any) -> None:
        import transformers

        self.shape = LlamaConfig(**shape, max_position_embeddings=2**20)
        with torch.device("meta"):
            meta = transformers.AutoModelForCausalLM.from_config(self.shape)
        super().__init__(meta, **kwargs)

    def configure_model(self) -> None:
        if self.model is None:
            self.model = AutoModelForCausalLM.from_config(self.shape, self.strategy, seed=1, kernels=self.kernels)
            packing_without_sync(self.model)
            defer_logits(self.model)
            self.model.train()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def real_text(folder: Path) -> Path:
    """The sources of the standard library, one document per file."""
    target = folder / "text.jsonl"
    if not target.exists():
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        lines = [json.dumps({"text": file.read_text(errors="replace")[:20_000]}) for file in files]
        partial = folder / f"text-{os.getpid()}"
        partial.write_text("\n".join(lines))
        partial.rename(target)
    return target


def run(args: argparse.Namespace) -> dict[str, Any]:
    shape = {**(TINY if args.tiny else EIGHT_B)}
    shape["num_hidden_layers"] = args.layers or shape["num_hidden_layers"]
    losses: list[float] = []
    if args.long:  # one document per row
        data: Any = MockDataModule(
            vocab_size=shape["vocab_size"], seq_len=args.seq_len, micro_batch_size=1, global_batch_size=1, num_samples=8
        )
    else:
        data = TextDataModule(
            str(real_text(Path(args.root))),
            tokenizer=byte_tokenizer(),
            seq_len=args.seq_len,
            micro_batch_size=args.micro_batch_size,
            global_batch_size=2 * args.micro_batch_size,
        )
    throughput = Throughput()
    trainer = Trainer(
        strategy=args.strategy,
        devices="auto",
        precision="bf16",
        max_steps=args.steps,
        log_every_n_steps=1,
        default_root_dir=args.root,
        callbacks=[_Curve(losses), throughput, *([_Primed()] if args.long else [])],
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
    )
    began = time.monotonic()
    # warm-up, because the first steps of Adam follow the signs of noisy gradients
    schedule = SchedulerConfig(name="linear", warmup_steps=min(10, args.steps // 2))
    trainer.fit(RandomModel(shape, lr=2e-5, scheduler=schedule), data)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    times = sorted(_Curve.times[len(_Curve.times) // 2 :])
    rows = 1 if args.long else 2 * args.micro_batch_size
    return {
        "losses": losses,
        "norms": _Curve.norms,
        "tokens_per_second": round(rows * args.seq_len / times[len(times) // 2], 1),
        "peak_gib": round(peak, 1),
        "seconds": round(time.monotonic() - began, 1),
        "first_step_s": round(_Curve.times[0], 1) if _Curve.times else None,
    }


class _Curve(Callback):
    times: list[float] = []
    norms: list[float] = []

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses
        self.began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.monotonic()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))  # waits for the device
        self.norms.append(float(trainer.callback_metrics["grad_norm"]))
        self.times.append(time.monotonic() - self.began)


class _Primed(Callback):
    """Create the optimizer state before the first step, so that this step needs as much memory as the later ones."""

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


def launch(strategy: str, args: argparse.Namespace, *extra: str) -> dict[str, Any]:
    given = ["--strategy", strategy, "--root", args.root, *extra]
    result = result_of(__file__, given, args.timeout, ranks=2)
    return {"failed": result} if isinstance(result, str) else result


def everything(args: argparse.Namespace) -> None:
    common = [*(["--tiny"] if args.tiny else []), "--layers", str(args.layers)]
    reference: list[float] = []
    for case in args.cases:
        sizes = ["--seq-len", str(args.seq_len), "--micro-batch-size", str(args.micro_batch_size)]
        result = launch(CASES[case], args, "--steps", str(args.steps), *sizes, *common)
        reference = reference or result.get("losses", [])
        if "losses" in result:
            pairs = list(zip(result["losses"], reference))
            result["worst_difference"] = round(max(abs(a - b) / b for a, b in pairs), 5)
            result["norms"] = [round(norm, 3) for norm in result["norms"][:: max(1, len(pairs) // 6)]]
            result["losses"] = [round(loss, 3) for loss in result["losses"][:: max(1, len(pairs) // 6)]]
        print(case, json.dumps(result), flush=True)
    for method in args.methods if args.long else ():
        for length in args.long:
            extra = ["--long", "1", "--seq-len", str(length), "--steps", str(args.long_steps), *common]
            strategy = f"fsdp2:cp=2,cp_attention={method},activation_checkpointing=full"
            result = launch(strategy, args, *extra)
            print(f"cp=2, {method}, one document of {length}", json.dumps(result), flush=True)
            if "failed" in result:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy")
    parser.add_argument("--cases", nargs="*", default=["fsdp2", "tp", "cp"], choices=list(CASES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--long", type=int, nargs="*", default=[])
    parser.add_argument("--long-steps", type=int, default=3)
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0: all")
    parser.add_argument("--methods", nargs="*", default=["ulysses"], choices=["ulysses", "ring"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--timeout", type=int, default=240)
    parser.add_argument("--root", default=None)
    args = parser.parse_args()
    args.root = args.root or tempfile.mkdtemp()
    if args.strategy is None:
        everything(args)
        return
    result = run(args)
    if int(os.environ.get("RANK", "0")) == 0:
        report(result)


if __name__ == "__main__":
    sys.exit(main())
