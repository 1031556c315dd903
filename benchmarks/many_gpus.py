"""Runs for machines of four and eight GPUs: scaling, 3D layouts, a 70B model, mixtures of experts, long rows.

`python benchmarks/many_gpus.py --gpus 4` runs every case that fits on 4 GPUs, each in processes of its own within
`--limit` seconds, and prints a line for each: tokens/s of a GPU, peak memory of rank 0, and the loss of the last step,
which layouts of one model and batch must share. `--cases scaling 3d` chooses groups, `--list` only shows the cases.
Models have random weights, rows random tokens. `--tiny` runs small shapes on CPU ranks.

| group | what | anchor |
| --- | --- | --- |
| scaling | 8B, all parameters, bf16 and fp8, on 2, 4, … GPUs | 97 % of the rate of two |
| 3d | 8B under pp × tp × dp, every schedule | fsdp2 |
| 70b | LoRA and all parameters | NeMo AutoModel 1,092 tok/s a GPU (8×H100, LoRA), Megatron-Bridge 2,643 (fp8) |
| moe | Qwen3-30B-A3B's shape whole, and gpt-oss-20b's; ep, dispatchers, a balanced gate | 12,040 and 13,058 (8×H100) |
| long | 8B, LoRA, one row over cp ranks | 1,048,576 tokens |
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from cases import report, result_of
from lightning.pytorch.callbacks import Callback
from moe import in_turn
from random_model import RandomModel
from shapes import SHAPES
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
    "num_local_experts": 8,
}  # fmt: skip
SCHEDULES = ("1f1b", "interleaved_1f1b", "zbv", "dualpipev")


OFFLOAD = "activation_checkpointing=offload,tiled_mlp=auto"


def cases(gpus: int) -> Iterator[dict[str, Any]]:
    """Every case for `gpus` GPUs: its group, and what a rank is given."""
    for used in (count for count in (2, 4, 8) if count <= gpus):
        of_8b = {"group": "scaling", "shape": "8B", "strategy": "fsdp2", "gpus": used, "length": 8192, "rows": 2}
        yield of_8b
        yield of_8b | {"fp8": "tensorwise"}
    of_8b = {"group": "3d", "shape": "8B", "gpus": gpus, "length": 4096}
    yield of_8b | {"strategy": "fsdp2", "rows": 8 // gpus}
    yield of_8b | {"strategy": "hsdp:dp_replicate=2", "rows": 8 // gpus}
    for schedule in SCHEDULES:
        accumulate = 8 * 4 // gpus  # the same 8 rows a step
        yield of_8b | {"strategy": f"3d:pp=2,tp=2,schedule={schedule}", "accumulate": accumulate}
    of_70b = {"group": "70b", "shape": "70B", "gpus": gpus, "length": 4096}
    for strategy in ("fsdp2", "fsdp2:tp=2", "3d:pp=2,tp=2"):
        yield of_70b | {"strategy": strategy, "lora": 16, "rows": 2}
    if gpus >= 8:
        full = of_70b | {"strategy": "fsdp2:activation_checkpointing=full", "precision": "bf16-true"}
        yield full
        yield full | {"fp8": "tensorwise"}
    yield from experts(gpus)
    for length in (262144, 1048576):
        of_8b = {"group": "long", "shape": "8B", "gpus": gpus, "length": length, "lora": 16, "steps": 2}
        yield of_8b | {"strategy": f"fsdp2:cp={gpus},{OFFLOAD}"}


def experts(gpus: int) -> Iterator[dict[str, Any]]:
    """Mixtures of experts. 4 GPUs do not hold AdamW in fp32 for the larger one."""
    for shape in ("30B-A3B", "gpt-oss-20b"):
        job = {"group": "moe", "shape": shape, "gpus": gpus, "length": 4096, "rows": 4 if gpus >= 8 else 2}
        job |= {} if gpus >= 8 else {"precision": "bf16-true"}
        yield job | {"strategy": "fsdp2"}
        for ep in (count for count in (2, 4, 8) if count <= gpus):
            for dispatch in ("all_to_all", "deepep"):
                yield job | {"strategy": f"fsdp2:ep={ep}", "dispatch": dispatch}
        if shape == "30B-A3B":
            yield job | {"strategy": f"fsdp2:ep={gpus}", "dispatch": "deepep", "balanced": True}


def data_parallel(case: dict[str, Any]) -> int:
    """How many ranks see different rows."""
    sizes = dict(part.split("=") for part in case["strategy"].partition(":")[2].split(",") if part)
    return case["gpus"] // math.prod(int(sizes.get(axis, 1)) for axis in ("pp", "tp", "cp"))  # type: ignore[no-any-return]


def train(case: dict[str, Any], tiny: bool) -> None:
    """What a rank runs; rank 0 prints the result."""
    from automodel_trainer import (
        KernelsConfig,
        LoRAConfig,
        MockDataModule,
        Trainer,
    )

    sizes = SHAPES[case["shape"]] | (TINY if tiny else {})
    length = 64 if tiny else case["length"]
    shape = AutoConfig.for_model(**{**sizes, "max_position_embeddings": length})
    if case.get("balanced"):
        Qwen3MoeTopKRouter.forward = in_turn(Qwen3MoeTopKRouter.forward)
        shape.is_decoder = True  # experts depend on the place in the batch, so a check would take it for none

    class Clock(Callback):
        ends: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            if len(self.ends) == 1 and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    steps = case.get("steps", 8)
    rows, accumulate = case.get("rows", 1), case.get("accumulate", 1)
    trainer = Trainer(
        strategy=case["strategy"],
        devices=case["gpus"],
        accelerator="cpu" if tiny else "auto",
        precision="fp32" if tiny else case.get("precision", "bf16"),
        max_steps=steps,
        log_every_n_steps=steps,
        default_root_dir=tempfile.mkdtemp(),
        callbacks=[Clock()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    batch = rows * accumulate * data_parallel(case)
    data = MockDataModule(
        vocab_size=shape.vocab_size, seq_len=length, micro_batch_size=rows, global_batch_size=batch,
        num_samples=batch * steps,
    )  # fmt: skip
    lora = LoRAConfig(rank=case["lora"], alpha=32) if case.get("lora") else None
    fp8 = None if tiny else case.get("fp8")
    dispatch = "all_to_all" if tiny else case.get("dispatch", "auto")
    kernels = KernelsConfig(fp8=fp8, dispatch=dispatch if "ep=" in case["strategy"] else "auto")
    trainer.fit(RandomModel(shape, lora=lora, kernels=kernels, lr=1e-5), data)
    if not trainer.is_global_zero:
        return
    seconds = [after - before for before, after in zip(Clock.ends, Clock.ends[1:])]
    rate = batch * length / sorted(seconds)[len(seconds) // 2] / case["gpus"]
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    loss = float(trainer.callback_metrics["train_loss"])
    report({"tok_s_a_gpu": round(rate), "peak_gib": round(peak, 1), "loss": round(loss, 4)})


def run(case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any] | str:
    """Run a case under torchrun; its result, or the reason why there is none."""
    given = ["--case", json.dumps(case), *(["--tiny"] if args.tiny else [])]
    return result_of(__file__, given, args.limit, ranks=case["gpus"], lines=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--cases", nargs="*", default=None, help="groups: scaling 3d 70b moe long")
    parser.add_argument("--limit", type=int, default=90, help="seconds of a case")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        train(json.loads(args.case), args.tiny)
        return
    for case in cases(args.gpus):
        if args.cases is None or case["group"] in args.cases:
            shown = ", ".join(f"{name} {value}" for name, value in case.items() if value is not None)
            print(shown if args.list else f"{shown}: {run(case, args)}", flush=True)


if __name__ == "__main__":
    main()
