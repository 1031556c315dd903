"""A mixture of experts of Qwen3-30B-A3B's shape, in bf16, with random weights.

python benchmarks/moe.py block              # one block of experts, forward and backward: transformers and ours
python benchmarks/moe.py block --profile    # and the kernels of ours, by time
python benchmarks/moe.py model --layers 6 --rows 4               # the Trainer, all parameters
python benchmarks/moe.py model --layers 48 --rows 2 --lora       # the Trainer, LoRA r=16 on all-linear
python benchmarks/moe.py model --layers 48 --rows 2 --lora --quantize nf4    # and held in 4 bits, or --fp8 tensorwise
python benchmarks/moe.py dispatch --gpus 2 --layers 6 --rows 4   # fsdp2, ep=2 by all_to_all, ep=2 by DeepEP
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from random_model import RandomModel
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, Qwen3MoeTopKRouter

from automodel_trainer import (
    KernelsConfig,
    LoRAConfig,
    MockDataModule,
    Trainer,
)
from automodel_trainer.models.kernels.experts import experts_to_fp8, swap_experts
from automodel_trainer.models.lora.layers import adapt_parameter

HIDDEN, WIDTH, EXPERTS, TOP, LENGTH = 2048, 768, 128, 8, 4096
OURS = ("ours", "fp8")
STACKED = ("gate_up_proj", "down_proj")


def block_of(kind: str, lora: bool) -> nn.Module:
    """A sparse block with random weights; `kind`: eager or grouped_mm of transformers, ours, or ours in fp8."""
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP,
        norm_topk_prob=True,
        experts_implementation="grouped_mm" if kind in OURS else kind,
    )
    torch.manual_seed(0)
    block = Qwen3MoeSparseMoeBlock(config).cuda().bfloat16()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.02)
    if lora:
        block.requires_grad_(False)
        for name in STACKED:
            adapt_parameter(block.experts, name, 16, 2.0, dtype=torch.float32)
            nn.init.normal_(block.experts.low_rank_of(name).lora_A.weight, 0, 0.02)
            nn.init.normal_(block.experts.low_rank_of(name).lora_B.weight, 0, 0.02)
    if kind in OURS:
        blocks = nn.ModuleList([block])
        swapped, _ = swap_experts(blocks)
        if kind == "fp8":
            assert not experts_to_fp8(blocks, swapped)
    return block


def step_of(block: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, parameters: list[nn.Parameter]) -> Any:
    def step() -> None:
        block(x).backward(grad)
        x.grad = None
        for parameter in parameters:
            parameter.grad = None

    return step


def milliseconds(step: Callable[[], None], runs: int = 10) -> float:
    for _ in range(4):
        step()
    start, end = torch.cuda.Event(True), torch.cuda.Event(True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(runs):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / runs


def gradients(block: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    out = block(x)
    out.backward(grad)
    found = {"output": out.detach(), "x": x.grad.clone()}
    found |= {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    x.grad = None
    block.zero_grad(set_to_none=True)
    return found


def compare(lora: bool, tokens: int = 512) -> None:
    """Relative errors of ours and of transformers' grouped_mm in bf16, against the eager code in fp32."""
    x = torch.randn(1, tokens, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    exact_block = block_of("eager", lora).float()
    exact = gradients(exact_block, x.detach().float().requires_grad_(), grad.float())
    for kind in ("grouped_mm", *OURS):
        got = gradients(block_of(kind, lora), x, grad)
        errors = {name: ((got[name].float() - exact[name]).norm() / exact[name].norm()).item() for name in exact}
        print(f"errors of {kind}{', LoRA' if lora else ''}: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))


def measure(tokens: int, profile: bool) -> None:
    flop = tokens * TOP * 3 * 2 * HIDDEN * WIDTH
    x = torch.randn(1, tokens, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    for lora in (False, True):
        for kind in ("grouped_mm", *OURS):
            for compiled in (False, True):
                block = block_of(kind, lora)
                run = torch.compile(block) if compiled else block
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step = step_of(run, x, grad, list(block.parameters()))
                time = milliseconds(step)
                peak = (torch.cuda.max_memory_allocated() - before) / 2**30
                rate = flop * (2 if lora else 3) / time / 1e9
                what = f"{kind}{', LoRA' if lora else ''}{', compiled' if compiled else ''}"
                print(f"{what}: {time:.2f} ms, {rate:.0f} TFLOP/s, {peak:.2f} GiB", flush=True)
                if profile and kind in OURS and compiled:
                    show(step)
                del block, run, step
                torch.compiler.reset()
    ends = torch.arange(1, EXPERTS + 1, device="cuda", dtype=torch.int32) * (tokens * TOP // EXPERTS)
    shapes = [(HIDDEN, 2 * WIDTH), (WIDTH, HIDDEN)]
    made = [
        (
            torch.randn(tokens * TOP, k, device="cuda", dtype=torch.bfloat16, requires_grad=True),
            torch.randn(EXPERTS, n, k, device="cuda", dtype=torch.bfloat16, requires_grad=True),
            torch.randn(tokens * TOP, n, device="cuda", dtype=torch.bfloat16),
        )
        for k, n in shapes
    ]

    def matmuls() -> None:
        for a, w, g in made:
            torch._grouped_mm(a, w.mT, offs=ends).backward(g)
            a.grad = w.grad = None

    time = milliseconds(matmuls)
    print(f"the six grouped matmuls alone, balanced: {time:.2f} ms, {3 * flop / time / 1e9:.0f} TFLOP/s")


def show(step: Callable[[], None]) -> None:
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    print_kernels(profiler, 3)


def print_kernels(profiler: Any, steps: int) -> None:
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy, last = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    print(f"  {busy / 1000 / steps:.1f} ms busy of {(last - spans[0][0]) / 1000 / steps:.1f} ms")
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    for row in rows[:22]:
        if row.self_device_time_total:
            print(f"  {row.self_device_time_total / 1000 / steps:7.3f} ms  {row.count / steps:5.1f} x  {row.key[:110]}")


def in_turn(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A router's forward that gives every expert as many tokens, in turn. Scores stay the router's."""

    def balanced(self: nn.Module, hidden_states: Tensor) -> Any:
        logits, scores, experts = forward(self, hidden_states)
        turns = torch.arange(experts.numel(), device=experts.device) % self.num_experts
        return logits, scores, turns.view(experts.shape)

    return balanced


def train(args: argparse.Namespace) -> None:
    """Steps of the Trainer on rows of 4,096 random tokens: tokens/s of the median step, and the peak of memory."""
    shape = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=HIDDEN, intermediate_size=6144, num_hidden_layers=args.layers, head_dim=128,
        num_attention_heads=32, num_key_value_heads=4, moe_intermediate_size=WIDTH, num_experts=EXPERTS,
        num_experts_per_tok=TOP, norm_topk_prob=True, max_position_embeddings=LENGTH,
    )  # fmt: skip

    if args.balanced:
        Qwen3MoeTopKRouter.forward = in_turn(Qwen3MoeTopKRouter.forward)
        shape.is_decoder = True  # experts depend on the place in the batch, so a check would take it for none

    class Clock(Callback):
        ends: list[float] = []

        def on_train_batch_end(self, *_: Any) -> None:
            torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            print(f"step {len(self.ends)}, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
            if len(self.ends) == 1:  # building random weights may have taken more
                torch.cuda.reset_peak_memory_stats()

    class OneStep(Callback):
        """Profile one step on the first rank: kernels by time, and how long none ran."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == args.steps - 1 and trainer.is_global_zero:
                self.profiler = torch.profiler.profile()
                self.profiler.start()

        def on_train_end(self, trainer: Any, *_: Any) -> None:
            torch.cuda.synchronize()
            if trainer.is_global_zero:
                self.profiler.stop()
                print_kernels(self.profiler, 1)

    trainer = Trainer(
        strategy=args.strategy,
        devices=args.gpus,
        precision="bf16",
        max_steps=args.steps,
        log_every_n_steps=args.steps,
        default_root_dir=tempfile.mkdtemp(),
        callbacks=[Clock(), *([OneStep()] if args.profile else [])],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    batch = args.rows * args.gpus
    data = MockDataModule(
        vocab_size=shape.vocab_size, seq_len=LENGTH, micro_batch_size=args.rows, global_batch_size=batch,
        num_samples=batch * args.steps,
    )  # fmt: skip
    lora = LoRAConfig(rank=16, alpha=32, quantize=args.quantize) if args.lora else None
    kernels = KernelsConfig(experts=args.experts, dispatch=args.dispatch, fp8=args.fp8)
    trainer.fit(RandomModel(shape, lora=lora, kernels=kernels, lr=1e-5), data)
    taken = sorted(b - a for a, b in zip(Clock.ends[2:], Clock.ends[3:]))
    rate = args.rows * LENGTH / taken[len(taken) // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30
    what = "LoRA" if args.lora else "all parameters"
    what += f", {args.quantize or args.fp8}" if args.quantize or args.fp8 else ""
    what += ", balanced gate" if args.balanced else ""
    job = f"{what}, {args.layers} layers, {args.rows} x {LENGTH} a GPU, experts {args.experts}"
    if args.gpus > 1:
        job += f", {args.gpus} GPUs, {args.strategy}, dispatch {args.dispatch}"
    if trainer.is_global_zero:
        loss = float(trainer.callback_metrics["train_loss"])
        print(f"{job}: {rate:.0f} tok/s a GPU, {peak:.1f} GiB, loss {loss:.4f}")


def dispatchers(args: argparse.Namespace) -> None:
    """The Trainer on several GPUs, one process group after another: the same batch for every layout."""
    given = ["--gpus", args.gpus, "--layers", args.layers, "--rows", args.rows, "--steps", args.steps]
    ep = f"fsdp2:ep={args.gpus}"
    for strategy, dispatch in (("fsdp2", "auto"), (ep, "all_to_all"), (ep, "deepep")):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.gpus}", __file__, "model"]
        options = ["--strategy", strategy, "--dispatch", dispatch, "--experts", args.experts]
        command = [sys.executable, *torchrun, *map(str, given), *options]
        command += [f"--{flag}" for flag in ("lora", "balanced") if getattr(args, flag)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if "tok/s a GPU" in line]
        print(found[-1] if found else f"{strategy}, {dispatch}: failed\n{done.stderr[-3000:]}", flush=True)


_JOBS = {"model": train, "dispatch": dispatchers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["block", "model", "dispatch"])
    parser.add_argument("--gpus", type=int, default=None, help="1, and 2 of dispatch")
    parser.add_argument("--dispatch", default="auto")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--experts", default="auto")
    parser.add_argument("--fp8", default=None, help="tensorwise, rowwise or rowwise_with_gw_hp")
    parser.add_argument("--quantize", default=None, help="nf4, with --lora")
    parser.add_argument("--strategy", default="fsdp2")
    parser.add_argument(
        "--balanced", action="store_true", help="every expert gets as many tokens, whatever the gate says"
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    args.gpus = args.gpus or (2 if args.what == "dispatch" else 1)
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    if args.what in _JOBS:
        _JOBS[args.what](args)
        return
    for lora in (False, True):
        compare(lora)
    measure(args.tokens, args.profile)


if __name__ == "__main__":
    main()
