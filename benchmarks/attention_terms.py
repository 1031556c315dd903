"""Attention with sinks or soft caps on one GPU: FlexAttention beside transformers' eager function.

`python benchmarks/attention_terms.py` prints two tables. Errors: loss and gradients of a small model in bf16, eager and
through blocks, relative to the eager model in fp32 with the same weights; rows packed with documents, and rows of one.
Steps: 12 blocks of gpt-oss-20b's shape with adapters, 2 rows of 4,096 tokens, blocks recomputed. `--tiny` is for a CPU.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from random_model import RandomModel
from shapes import SHAPES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from automodel_trainer import LoRAConfig, MockDataModule, Trainer
from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.models.kernels import KernelsConfig, apply_kernels

SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096, "sliding_window": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 4},  # all: rounding chooses none
    "gemma2": {"attn_logit_softcapping": 5.0},
}
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def step(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss, and gradients by name."""
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def errors(family: str, length: int) -> None:
    """Print a line for each kind of rows and each way to attend."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    exact = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").to(DEVICE)
    for name, parameter in exact.named_parameters():
        if "sinks" in name:
            parameter.data.uniform_(-1, 3)
        elif "q_proj.weight" in name:
            parameter.data *= 5
    ids = torch.randint(5, 4096, (2, length), device=DEVICE)
    cut = torch.arange(length // 3, device=DEVICE), torch.arange(length - length // 3, device=DEVICE)
    kinds = {"packed": {"position_ids": torch.cat(cut).expand(2, -1)}, "of one document": {}}
    models = {}
    for name in ("eager", "auto"):
        models[name] = copy.deepcopy(exact).bfloat16()
        apply_kernels(models[name], KernelsConfig(attention=name), DEVICE)
    for model in (exact, *models.values()):
        packing_without_sync(model)
    for kind, more in kinds.items():
        inputs = {"input_ids": ids, **more}
        loss, gradients = step(exact, inputs)
        for name, model in models.items():
            found, grads = step(model, inputs)
            off = {n: float((grads[n] - g).norm() / g.norm()) for n, g in gradients.items() if g.norm() > 0}
            terms = {n: e for n, e in off.items() if "sinks" in n or "q_proj.weight" in n}
            print(
                f"| {family}, rows {kind} | {name} | {abs(found / loss - 1):.1e} | {max(off.values()):.1e} "
                f"| {max(terms.values()):.1e} |",
                flush=True,
            )


class Clock(Callback):
    """Seconds of steps after the first three."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        if GPU:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def steps(attention: str, tiny: bool) -> None:
    """Print tokens per second and the peak."""
    length = 64 if tiny else 4096
    sizes = {**SHAPES["gpt-oss-20b"], "num_hidden_layers": 12, **({**SMALL, "num_hidden_layers": 2} if tiny else {})}
    clock = Clock()
    data = MockDataModule(
        vocab_size=4096, seq_len=length, micro_batch_size=2, global_batch_size=2, num_samples=16
    )  # fmt: skip
    model = RandomModel(
        AutoConfig.for_model(**sizes), lora=LoRAConfig(rank=16), kernels=KernelsConfig(attention=attention), lr=1e-5
    )
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    Trainer(
        strategy="fsdp2:activation_checkpointing=full", devices=1, precision="bf16" if GPU else "fp32", max_steps=8,
        default_root_dir=tempfile.mkdtemp(), callbacks=[clock], enable_checkpointing=False, enable_progress_bar=False,
        logger=False,
    ).fit(model, data)  # fmt: skip
    rate = 2 * length * 5 / (clock.ends[-1] - clock.ends[2])
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0
    print(f"| {attention} | {rate:,.0f} | {peak:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    print(
        "| model | attention | error of the loss | of gradients, at most | of queries and sinks |\n"
        + "| --- " * 5
        + "|"
    )
    for family in FAMILIES:
        errors(family, 96 if tiny else 1000)
    print("| attention | tokens/s | GiB |\n" + "| --- " * 3 + "|")
    for attention in ("eager", "auto"):
        steps(attention, tiny)


if __name__ == "__main__":
    main()
