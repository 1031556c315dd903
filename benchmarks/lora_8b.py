"""LoRA (r=16, all projections) on a llama-8B-shaped model on one GPU: seq 4096, 4 micro-batches of 2 rows per step.

`python benchmarks/lora_8b.py` runs each case in its own process on the same GPU. It prints a line for each, with the
ratio to every peer. `--profile DIR` writes the kernels of our step. `--tiny` is for a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cases import report, result_of
from peer import SPECIAL, TARGETS, save_random, unsloth_model

EIGHT_B: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
EIGHT_B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5}
TINY: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "rope_theta": 5e5}
ROWS, ACCUMULATION = 2, 4
CASES = ("ours", "ours, separate", "ours, eager", "ours, fp8", "ours, fp8, separate", "ours, nf4")
CASES += ("peft and liger", "unsloth")


def ours(args: argparse.Namespace) -> dict[str, Any]:
    from lightning.pytorch.callbacks import Callback
    from transformers import LlamaConfig

    from automodel_trainer import (
        AutoModelForCausalLM,
        CausalLMModule,
        KernelsConfig,
        LoRAConfig,
        MockDataModule,
        Trainer,
    )
    from automodel_trainer.models._masks import packing_without_sync
    from automodel_trainer.nn.deferred_logits import defer_logits

    shape = LlamaConfig(**args.shape, max_position_embeddings=8192)
    kernels = KernelsConfig(
        fp8=args.fp8 if "fp8" in args.case else None,
        lora=next((choice for choice in ("separate", "widened") if choice in args.case), "auto"),
    )

    class RandomLoRA(CausalLMModule):
        def configure_model(self) -> None:
            if self.model is None:
                self.model = AutoModelForCausalLM.from_config(
                    shape, self.strategy, seed=1, kernels=self.kernels, lora=self.lora
                )
                packing_without_sync(self.model)
                defer_logits(self.model)
                self.model.train()

    class Clock(Callback):
        def __init__(self) -> None:
            self.ends: list[Moment] = []
            self.profiler: Any = None

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if args.profile and trainer.global_step == args.steps - 1:
                synchronize()
                activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
                self.profiler = torch.profiler.profile(activities=activities)
                self.profiler.start()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if self.profiler:
                synchronize()
                self.profiler.stop()
            self.ends.append(Moment(wait=not self.ends))

        def on_train_end(self, trainer: Any, *_: Any) -> None:
            self.loss = float(trainer.callback_metrics["train_loss"])

    clock = Clock()
    data = MockDataModule(
        vocab_size=args.shape["vocab_size"],
        seq_len=args.seq_len,
        micro_batch_size=ROWS,
        global_batch_size=ROWS * ACCUMULATION,
        num_samples=ROWS * ACCUMULATION * args.steps,
    )
    trainer = Trainer(
        strategy="fsdp2:compile=false" if "eager" in args.case else "fsdp2",
        devices=1,
        precision="bf16",
        max_steps=args.steps,
        log_every_n_steps=args.steps,
        default_root_dir=tempfile.mkdtemp(),
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    with torch.device("meta"):
        import transformers

        meta = transformers.AutoModelForCausalLM.from_config(shape)
    began = time.perf_counter()
    lora = LoRAConfig(rank=16, alpha=32, quantize="nf4" if "nf4" in args.case else None)
    trainer.fit(RandomLoRA(meta, lora=lora, kernels=kernels, lr=1e-4), data)
    if args.profile:
        Path(args.profile).mkdir(parents=True, exist_ok=True)
        (Path(args.profile) / f"{args.case.replace(', ', '_')}.txt").write_text(largest_kernels(clock.profiler))
        clock.ends.pop()
    return figures(args, began, clock.ends, clock.loss)


def largest_kernels(profiler: Any) -> str:
    found = [e for e in profiler.key_averages() if str(e.device_type).endswith("CUDA") and not e.is_user_annotation]
    found.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in found)
    lines = [f"{e.self_device_time_total / 1e3:9.2f} ms {e.count:6d} × {e.key[:110]}" for e in found[:90]]
    return "\n".join([f"{total / 1e3:9.2f} ms in all", *lines, "", *waits(profiler)])


def waits(profiler: Any) -> list[str]:
    """Gaps in which the GPU was idle, by the kernels before and after, and the longest gap."""
    kernels = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in profiler.events()
        if str(e.device_type).endswith("CUDA") and not e.is_user_annotation
    )
    start, end, before = kernels[0]
    found: list[tuple[float, float, str]] = []
    for begins, ends, name in kernels[1:]:
        if begins > end:
            found.append((begins - end, end - start, f"{before[:60]} -> {name[:60]}"))
        if ends > end:
            end, before = ends, name
    total: dict[str, list[float]] = {}
    for wait, _, names in found:
        total.setdefault(names, []).append(wait)
    lines = [f"{sum(wait for wait, *_ in found) / 1e3:9.2f} ms idle of {(end - kernels[0][0]) / 1e3:.2f} ms"]
    largest = sorted(total.items(), key=lambda item: -sum(item[1]))[:40]
    lines += [f"{sum(waits) / 1e3:9.2f} ms {len(waits):6d} × {names}" for names, waits in largest]
    longest = sorted(found, reverse=True)[:30]
    return [*lines, *(f"{wait / 1e3:9.3f} ms at {at / 1e3:9.2f} ms: {names}" for wait, at, names in longest)]


def peft_and_liger(args: argparse.Namespace) -> dict[str, Any]:
    """A bare loop with the parts that HF Trainer would use: PEFT's adapters, Liger's kernels, SDPA."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    apply_liger_kernel_to_llama()
    with torch.device(device()):
        config = LlamaConfig(**args.shape, max_position_embeddings=8192)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS), autocast_adapter_dtype=False)
    return loop(args, model.train())


def unsloth(args: argparse.Namespace) -> dict[str, Any]:
    """Unsloth with its own loading and adapters. It needs the folder written by `--save DIR`."""
    return loop(args, unsloth_model(args.folder, args.seq_len))


def loop(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ends: list[Moment] = []
    total = torch.zeros((), device=device())
    began = time.perf_counter()
    for _ in range(args.steps):
        shape = (ROWS, args.seq_len)
        rows = [torch.randint(0, args.shape["vocab_size"], shape, device=device()) for _ in range(ACCUMULATION)]
        for row in rows:
            loss = model(input_ids=row, labels=row).loss
            (loss / ACCUMULATION).backward()
            total += loss.detach() / ACCUMULATION
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(Moment(wait=not ends))
    return figures(args, began, ends, float(total) / args.steps)


class Moment:
    """An event at the end of the device's current work. The host does not wait for it."""

    def __init__(self, wait: bool = False) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        if wait:
            synchronize()
        self.time = time.perf_counter()
        if self.event is not None:
            self.event.record()

    def since(self, earlier: Moment) -> float:
        """Durations of the steps in seconds."""
        if self.event is None or earlier.event is None:
            return self.time - earlier.time
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def figures(args: argparse.Namespace, began: float, ends: list[Moment], loss: float) -> dict[str, Any]:
    """Statistics of the steps after the third: the median, and the range (slowest − fastest) relative to it.

    Also how far the host is ahead of the device after it has launched a step (median of the same steps). The host
    waited for the device at the first step.
    """
    ahead = sorted(end.since(ends[0]) - (end.time - ends[0].time) for end in ends[2:])
    steady = sorted(after.since(before) for before, after in pairwise(ends[2:]))
    median = steady[len(steady) // 2]
    return {
        "tokens_per_second": round(ROWS * ACCUMULATION * args.seq_len / median, 1),
        "spread": round((steady[-1] - steady[0]) / median, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0,
        "host_ahead_ms": round(ahead[len(ahead) // 2] * 1e3, 1),
        "until_first_step_s": round(ends[0].time - began, 1),
        "mean_loss": round(loss, 4),
    }


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def save(args: argparse.Namespace) -> None:
    """Write a checkpoint with random weights and a tokenizer, for peers that can only load from a folder."""
    from transformers import LlamaConfig

    save_random(args.save, LlamaConfig(**args.shape, max_position_embeddings=8192, **SPECIAL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--cases", nargs="*", default=["ours", "peft and liger"], choices=CASES)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--fp8", default="tensorwise")
    parser.add_argument("--profile")
    parser.add_argument("--folder", default="/tmp/llama8b")
    parser.add_argument("--save")
    parser.add_argument("--timeout", type=int, default=200)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.shape = TINY if args.tiny else EIGHT_B
    if args.save:
        save(args)
        return
    if args.case:
        run = unsloth if args.case == "unsloth" else peft_and_liger if "peft" in args.case else ours
        report(run(args))
        return
    results: dict[str, Any] = {}
    for case in args.cases:
        passed = [a for a in sys.argv[1:] if a not in ("--cases", *args.cases)]
        found = result_of(__file__, ["--case", case, *passed], args.timeout)
        if isinstance(found, str):
            print(case, found, flush=True)
            continue
        results[case] = found
        print(case, json.dumps(found), flush=True)
    peers = [case for case in results if not case.startswith("ours")]
    for case in results:
        for peer in peers:
            ratio = results[case]["tokens_per_second"] / results[peer]["tokens_per_second"]
            print(f"{case} / {peer}: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
