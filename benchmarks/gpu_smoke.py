"""Check on real GPUs what the tests check on CPUs. `python benchmarks/gpu_smoke.py` runs each case in a process.

Cases: the loss curve of one GPU against two under every layout (NCCL, fp32), resume on another number of GPUs, host
syncs inside a step, the throughput of a 1B-shaped model in bf16, and answers of its sharded copy, recorded and not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from cases import report, result_of
from lightning.pytorch.callbacks import Callback
from lora_8b import synchronize
from transformers import LlamaConfig

from automodel_trainer import AutoModelForCausalLM, CausalLMModule, MockDataModule, Trainer
from automodel_trainer.callbacks import DCPCheckpoint, Throughput
from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.nn import recorded_call

SMALL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 4, "vocab_size": 1024, "tie_word_embeddings": True}
ONE_B: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
ONE_B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256}


class RandomModel(CausalLMModule):
    """A model with random weights that are the same under every layout."""

    def __init__(self, shape: dict[str, Any], **kwargs: Any) -> None:
        with torch.device("meta"):
            import transformers

            meta = transformers.AutoModelForCausalLM.from_config(LlamaConfig(**shape))
        super().__init__(meta, **kwargs)
        self.shape = shape

    def configure_model(self) -> None:
        if self.model is None:
            self.model = AutoModelForCausalLM.from_config(LlamaConfig(**self.shape), self.strategy, seed=1).train()
            packing_without_sync(self.model)


class Curve(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.losses.append(round(float(trainer.callback_metrics["train_loss"]), 6))


class SyncWatch(Callback):
    """Count the places where the host waits for the device in steps without logging."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        quiet = trainer.global_step > 3 and (trainer.global_step + 1) % trainer.log_every_n_steps
        torch.cuda.set_sync_debug_mode("warn" if quiet else "default")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def small(strategy: str, root: str, steps: int, resume: bool) -> dict[str, Any]:
    data = MockDataModule(vocab_size=1024, seq_len=256, micro_batch_size=2, global_batch_size=8, num_samples=200)
    curve = Curve()
    trainer = Trainer(
        strategy=strategy,
        devices="auto",
        precision="fp32",
        max_steps=steps,
        log_every_n_steps=1,
        default_root_dir=root,
        callbacks=[curve, DCPCheckpoint(every_n_steps=5)],
        enable_progress_bar=False,
        logger=False,
    )
    trainer.fit(RandomModel(SMALL, lr=1e-3), data, ckpt_path="last" if resume else None)
    return {"losses": curve.losses, "step": trainer.global_step}


def one_b(strategy: str, root: str) -> dict[str, Any]:
    data = MockDataModule(vocab_size=128256, seq_len=4096, micro_batch_size=2, global_batch_size=4, num_samples=400)
    watch, throughput = SyncWatch(), Throughput()
    trainer = Trainer(
        strategy=strategy,
        devices=1,
        precision="bf16",
        max_steps=30,
        log_every_n_steps=10,
        default_root_dir=root,
        callbacks=[watch, throughput],
        enable_checkpointing=False,
        logger=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(RandomModel(ONE_B, lr=1e-5), data)
    syncs = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return {"throughput": throughput.last, "host_syncs": {place: syncs.count(place) for place in set(syncs)}}


def decode(strategy: str) -> dict[str, Any]:
    """Answers of the 1B shape: with a dynamic cache, with a static one as transformers has it, and replayed."""
    config = LlamaConfig(**ONE_B, tie_word_embeddings=True, pad_token_id=0)
    sharded = AutoModelForCausalLM.from_config(config, strategy, dtype=torch.bfloat16, seed=1)
    device = sharded.device
    alone = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, seed=1, device=device)
    ids = torch.arange(4, 260, device=device).view(4, 64)
    found: dict[str, Any] = {}
    for name, model in (("alone", alone), ("sharded", sharded)):
        for cache in ("dynamic", "static"):
            options: dict[str, Any] = {"cache_implementation": cache, "disable_compile": True, "do_sample": True}
            options |= {"max_new_tokens": 64, "min_new_tokens": 64}
            generate: Any = model.generate
            for _ in range(2):
                torch.manual_seed(1)
                synchronize()
                began = time.perf_counter()
                tokens = generate(ids, attention_mask=torch.ones_like(ids), **options)
                synchronize()
            found[f"{name}, {cache}, ms a token"] = round((time.perf_counter() - began) / 64 * 1e3, 2)
            found[f"{name}, {cache}"] = tokens.cpu()
    # Both a whole and a gathered weight are bf16, and both run the same kernels: answers are equal to the last token.
    equal = {
        cache: torch.equal(found.pop(f"alone, {cache}"), found.pop(f"sharded, {cache}"))
        for cache in ("dynamic", "static")
    }
    return {**found, "equal": equal, "graphs": len(recorded_call.last_graphs)}


def launch(case: str, strategy: str, root: str, gpus: int, *extra: str) -> dict[str, Any]:
    given = ["--case", case, "--strategy", strategy, "--root", root, *extra]
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    result = result_of(__file__, given, 280, ranks=gpus if gpus > 1 else 0, environment=visible)
    return {"failed": result} if isinstance(result, str) else result


def everything() -> None:
    count = torch.cuda.device_count()
    base = Path(tempfile.mkdtemp())
    reference = launch("small", "auto", str(base / "one"), 1)
    print("one GPU, fp32:", reference, flush=True)
    several = ("hsdp", "fsdp2:tp=2", "fsdp2:cp=2", "fsdp2:cp=2,cp_attention=ring") if count > 1 else ()
    for strategy in ("ddp", "fsdp2", *several):
        result = launch("small", strategy, str(base / strategy.replace(":", "-")), min(count, 2))
        if "losses" in result and "losses" in reference:
            pairs = zip(result["losses"], reference["losses"])
            result["worst_relative_difference"] = max(abs(a - b) / b for a, b in pairs)
        print(strategy, min(count, 2), result, flush=True)
    first = launch("small", "fsdp2", str(base / "resume"), min(count, 2), "--steps", "5")
    second = launch("small", "ddp", str(base / "resume"), 1, "--resume")
    print("resume fsdp2@2 -> ddp@1:", first, second, flush=True)
    if count > 1:
        print("answers", launch("decode", "fsdp2", str(base / "decode"), 2), flush=True)
    for strategy in ("auto", "ddp"):
        print("1B bf16", strategy, launch("one_b", strategy, str(base / f"b{strategy}"), 1), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=["small", "one_b", "decode"])
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--root", default="/tmp/smoke")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if args.case is None:
        everything()
        return
    if args.case == "decode":
        result = decode(args.strategy)
    elif args.case == "one_b":
        result = one_b(args.strategy, args.root)
    else:
        result = small(args.strategy, args.root, args.steps, args.resume)
    report(result)


if __name__ == "__main__":
    main()
