"""LoRA (r=16) on the language model of a vision-language model on one GPU: packed rows of 8,192 tokens.

`python benchmarks/vlm.py` runs each case in its own process on the same GPU: rows with pictures, with videos, of text
alone (the same language model, equal tokens), and transformers' Trainer with PEFT and Unsloth on the same pictures,
several of which make one padded batch. Weights are random, pictures are drawn once as JPEG files. `--whole` trains all
of the language model in bf16 and a frozen tower. Unsloth reads the model from `--folder`, and `--peer-path` takes the
place of PYTHONPATH there, because it needs other versions of packages. `--tiny` is for a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cases import report, result_of
from vlm_data import SHAPES, WARM_UP, model_of, peak, processor_of, synchronize, write_data
from vlm_peers import save_for_unsloth, transformers_trainer, unsloth

CASES = ("pictures", "videos", "text", "transformers' Trainer", "unsloth")


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """This project's Trainer."""
    from lightning.pytorch.callbacks import Callback

    from automodel_trainer import ImageTextDataModule, ImageTextModule, LoRAConfig, Trainer

    class Clock(Callback):
        def __init__(self) -> None:
            self.began = self.seconds = self.waited = 0.0
            self.tokens = self.ended = 0.0

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == WARM_UP:
                synchronize()
                self.began = self.ended = time.perf_counter()
            elif index > WARM_UP:
                self.waited += time.perf_counter() - self.ended
            if index >= WARM_UP:
                self.tokens += sum(micro["input_ids"].numel() for micro in batch)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index + 1 == args.steps:
                synchronize()
                self.seconds = time.perf_counter() - self.began
            self.ended = time.perf_counter()

    with tempfile.TemporaryDirectory() as name:
        folder, clock = Path(name), Clock()
        args.samples = 2 * args.steps * args.rows * (args.seq_len // min(args.seq_len, (args.pixels // 32) ** 2) + 1)
        file = write_data(folder, args)
        data = ImageTextDataModule(
            str(file), seq_len=args.seq_len, micro_batch_size=1, global_batch_size=args.rows, num_workers=args.workers,
            cache=False,
        )  # fmt: skip
        lora = None if args.whole else LoRAConfig(rank=16)
        lr, precision = (1e-5, "bf16-true") if args.whole else (1e-4, "bf16")
        module = ImageTextModule(model_of(args), processor=processor_of(args, args.case == "videos"), lora=lora, lr=lr)
        trainer = Trainer(
            strategy="fsdp2",
            devices=1,
            precision=precision,
            max_steps=args.steps,
            callbacks=[clock],
            enable_checkpointing=False,
            enable_progress_bar=False,
            logger=False,
            default_root_dir=folder,
            log_every_n_steps=args.steps,
        )
        trainer.fit(module, data)
        waited = clock.waited / clock.seconds
        return {
            "tokens_per_second": round(clock.tokens / clock.seconds, 1),
            "peak_gib": peak(),
            "loader_wait": f"{waited:.1%}",
            "loss": round(float(trainer.callback_metrics["train_loss"]), 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=[*CASES, "save"])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--family", choices=SHAPES, default="qwen2_5_vl")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2, help="rows of an optimizer step")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--pixels", type=int, default=1024, help="on each side of a picture")
    parser.add_argument("--answer", type=int, default=200, help="tokens")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--folder", default="/tmp/vlm")
    parser.add_argument("--peer-path", default="")
    parser.add_argument("--timeout", type=int, default=200)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.case:
        peers = {"transformers' Trainer": transformers_trainer, "unsloth": unsloth, "save": save_for_unsloth}
        report(peers.get(args.case, ours)(args))
        return
    results: dict[str, Any] = {}
    for case in args.cases:
        passed = [a for a in sys.argv[1:] if a not in ("--cases", *args.cases)]
        environment = {}
        if case == "unsloth":
            if saved := result_of(__file__, ["--case", "save", *passed], args.timeout):
                print("save", saved, flush=True)
            environment = {"PYTHONPATH": args.peer_path} if args.peer_path else {}
        found = result_of(__file__, ["--case", case, *passed], args.timeout, environment=environment)
        if isinstance(found, str):
            print(case, found, flush=True)
            continue
        results[case] = found
        print(args.family, case, json.dumps(found), flush=True)
    for case in results:
        if case != "pictures" and "pictures" in results:
            ratio = results["pictures"]["tokens_per_second"] / results[case]["tokens_per_second"]
            print(f"pictures / {case}: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
