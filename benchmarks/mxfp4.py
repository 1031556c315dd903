"""LoRA on an mxfp4 checkpoint of gpt-oss-20b's shape on one GPU: experts held as its files have them, in NF4, or dense.

`python benchmarks/mxfp4.py --layers 12` writes random codes once and trains on rows of 4,096 random tokens. Each case
runs in its own process: tokens/s and peak memory of the steps after the second, seconds until the model is there, and
the first loss, which `mxfp4` and `dense` must share, since they have the same weights. `--tiny` only shows that the
script runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cases import report, result_of
from shapes import SHAPES

CASES = ["mxfp4", "nf4", "dense"]
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 16, "vocab_size": 512}
EXPERTS = ("gate_up_proj", "down_proj")


def write_checkpoint(folder: Path, layers: int, tiny: bool) -> None:
    """A folder as the Hub has them: random codes and exponents for experts, random bf16 for the rest."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SHAPES["gpt-oss-20b"] | {"num_hidden_layers": layers} | (TINY if tiny else {})
    config = AutoConfig.for_model(**sizes, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(EXPERTS):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32, 16)
            codes = torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)
            exponents = torch.randint(118, 124, shape[:-1], dtype=torch.uint8, device=device, generator=generator)
            tensors |= {f"{name}_blocks": codes.cpu(), f"{name}_scales": exponents.cpu()}
        else:
            values = torch.randn(tensor.shape, device=device, generator=generator) * 0.02
            tensors[name] = (values + ("norm" in name)).bfloat16().cpu()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(written | {"architectures": [type(model).__name__]}))


def run(case: str, args: argparse.Namespace) -> dict[str, Any]:
    from lightning.pytorch.callbacks import Callback

    from automodel_trainer import CausalLMModule, LoRAConfig, MockDataModule, Trainer

    gpu, length = torch.cuda.is_available(), 64 if args.tiny else 4096
    ends, losses = [], []

    class Clock(Callback):
        def on_train_start(self, *_: Any) -> None:
            ends.append(time.perf_counter())

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            losses.append(round(float(trainer.callback_metrics["train_loss"]), 4))
            ends.append(time.perf_counter())
            if gpu and len(losses) == 2:
                torch.cuda.reset_peak_memory_stats()

    trainer = Trainer(
        strategy=f"fsdp2:activation_checkpointing={args.checkpointing}" if args.checkpointing else "fsdp2",
        devices=1,
        precision="bf16" if gpu else "fp32",
        max_steps=args.steps,
        log_every_n_steps=1,
        default_root_dir=tempfile.mkdtemp(),
        callbacks=[Clock()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    vocabulary = json.loads((Path(args.folder) / "config.json").read_text())["vocab_size"]
    data = MockDataModule(
        vocab_size=vocabulary, seq_len=length, micro_batch_size=2, global_batch_size=2, num_samples=2 * args.steps
    )
    lora = LoRAConfig(rank=16, alpha=32, quantize=None if case == "dense" else case)
    began = time.perf_counter()
    trainer.fit(CausalLMModule(args.folder, lora=lora, lr=1e-4), data)
    step = statistics.median(after - before for before, after in pairwise(ends[2:]))
    return {
        "tok_s": round(2 * length / step),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else 0,
        "ready_s": round(ends[0] - began, 1),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--case")
    parser.add_argument("--folder", default=tempfile.gettempdir() + "/mxfp4")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--checkpointing", default="")
    parser.add_argument("--timeout", type=int, default=150)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.case:
        report(run(args.case, args))
        return
    folder = Path(args.folder) / (f"tiny-{args.layers}" if args.tiny else str(args.layers))
    if not folder.exists():
        write_checkpoint(folder, args.layers, args.tiny)
    given = ["--folder", str(folder), "--steps", str(args.steps), "--checkpointing", args.checkpointing]
    for case in args.cases:
        found = result_of(__file__, ["--case", case, *given, *["--tiny"] * args.tiny], args.timeout)
        print(f"{case}: {found}", flush=True)


if __name__ == "__main__":
    main()
