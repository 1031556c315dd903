"""One block of experts of Qwen3-30B-A3B's width, forward and backward in bf16, on one GPU: transformers and ours.

python benchmarks/moe.py block              # hidden 2048, 128 experts of 768, top 8, 16,384 tokens
python benchmarks/moe.py block --profile    # and the kernels of ours, by time
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from automodel_trainer.models.kernels.experts import swap_experts
from automodel_trainer.models.lora.layers import adapt_parameter

HIDDEN, WIDTH, EXPERTS, TOP = 2048, 768, 128, 8
STACKED = ("gate_up_proj", "down_proj")


def block_of(kind: str, lora: bool) -> nn.Module:
    """A sparse block with random weights; `kind`: eager or grouped_mm of transformers, or ours."""
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP,
        norm_topk_prob=True,
        experts_implementation="grouped_mm" if kind == "ours" else kind,
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
    if kind == "ours":
        swap_experts(nn.ModuleList([block]))
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
    for kind in ("grouped_mm", "ours"):
        got = gradients(block_of(kind, lora), x, grad)
        errors = {name: ((got[name].float() - exact[name]).norm() / exact[name].norm()).item() for name in exact}
        print(f"errors of {kind}{', LoRA' if lora else ''}: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))


def measure(tokens: int, profile: bool) -> None:
    flop = tokens * TOP * 3 * 2 * HIDDEN * WIDTH
    x = torch.randn(1, tokens, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    for lora in (False, True):
        for kind in ("grouped_mm", "ours"):
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
                if profile and kind == "ours" and compiled:
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
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    for row in rows[:22]:
        if row.self_device_time_total:
            print(f"  {row.self_device_time_total / 3000:7.3f} ms  {row.count / 3:5.1f} x  {row.key[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["block"])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    for lora in (False, True):
        compare(lora)
    measure(args.tokens, args.profile)


if __name__ == "__main__":
    main()
