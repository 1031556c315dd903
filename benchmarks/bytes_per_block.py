"""Bytes that a block keeps from its forward to its backward, on one GPU: llama-8B's shape, LoRA r=16, one long row.

`python benchmarks/bytes_per_block.py` runs every case in its own process and prints the ledger's figure, the size of
the block's input, and the peak. `--layers 32 --seq-len 65536 --cases "full"` shows how long a row may be. `--tiny` only
shows that the script runs.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from cases import report, result_of

EIGHT_B: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128, "vocab_size": 128256}
EIGHT_B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 5e5}
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 224, "head_dim": 16, "vocab_size": 512}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 1, "rope_theta": 5e5}
# Words of a case: full or selective (else no checkpointing), eager, separate, fp8, nf4, packed, whole (no LoRA).
CASES = [
    "none",
    "full",
    "full packed",
    "full separate",
    "full eager",
    "full eager separate",
    "full fp8",
    "full fp8 packed",
]
CASES += ["full nf4", "full whole", "selective", "selective separate", "selective fp8"]


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lightning.pytorch.callbacks import Callback
    from random_model import RandomModel
    from transformers import LlamaConfig

    from automodel_trainer import (
        KernelsConfig,
        LoRAConfig,
        MockDataModule,
        Trainer,
    )
    from automodel_trainer.callbacks import Ledger

    words = set(args.case.split())
    shape = LlamaConfig(**args.shape, num_hidden_layers=args.layers, max_position_embeddings=args.seq_len)

    class Pack(Callback):
        """Makes four documents of the row."""

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if "packed" in words:
                for micro_batch in batch:
                    positions = torch.arange(args.seq_len, device=micro_batch["input_ids"].device)
                    micro_batch["position_ids"] = (positions % (args.seq_len // 4)).expand_as(micro_batch["input_ids"])
                    micro_batch |= {"packed": True, "document_lengths": [[args.seq_len // 4] * 4]}

    strategy = "fsdp2" + ":" * bool(words & {"full", "selective", "eager"})
    parts = [f"activation_checkpointing={word}" for word in ("full", "selective") if word in words]
    strategy += ",".join([*parts, *(["compile=false"] if "eager" in words else [])])
    ledger = Ledger()
    trainer = Trainer(
        strategy=strategy,
        devices=1,
        precision="bf16",
        max_steps=1,
        log_every_n_steps=1,
        default_root_dir=tempfile.mkdtemp(),
        callbacks=[ledger, Pack()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    data = MockDataModule(vocab_size=args.shape["vocab_size"], seq_len=args.seq_len, num_samples=1)
    lora = None if "whole" in words else LoRAConfig(rank=16, alpha=32, quantize="nf4" if "nf4" in words else None)
    kernels = KernelsConfig(
        lora="separate" if "separate" in words else "auto", fp8="tensorwise" if "fp8" in words else None
    )
    trainer.fit(RandomModel(shape, lora=lora, kernels=kernels, lr=1e-4), data)
    kept = ledger.facts["run"]["bytes_per_block"]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "kept_gib": None if kept is None else round(kept / 2**30, 3),
        "input_gib": round(args.seq_len * args.shape["hidden_size"] * 2 / 2**30, 3),
        "peak_gib": round(peak / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case")
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--timeout", type=int, default=180)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.shape = TINY if args.tiny else EIGHT_B
    if args.case is not None:
        report(run(args))
        return
    passed = ["--layers", str(args.layers), "--seq-len", str(args.seq_len), *(["--tiny"] if args.tiny else [])]
    for case in args.cases:
        print(f"{case}: {result_of(__file__, ['--case', case, *passed], args.timeout)}", flush=True)


if __name__ == "__main__":
    main()
