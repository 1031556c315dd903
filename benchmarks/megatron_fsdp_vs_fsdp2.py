"""Compare Megatron-FSDP with FSDP2 on 2 GPUs. `python benchmarks/megatron_fsdp_vs_fsdp2.py` takes about 5 minutes.

Cases: the same fp32 curve under every ZeRO stage and with tensor parallelism, context parallelism and activation
checkpointing; checkpoints saved by one and resumed by the other; LoRA; a 1B-shaped llama from a safetensors checkpoint
on real text (the standard library's own sources) for 50 steps; throughput and memory at 8B with 8192 tokens. The script
prints a line per case and writes a JSON file.

Cases run one after another in the same two processes, which are restarted if a case fails or exceeds its time limit.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPUS = int(os.environ.get("GPUS", "2"))
BUDGET = 350  # seconds for everything
START = 75  # maximum seconds until the first case of two processes begins
SMALL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 520, "num_hidden_layers": 4, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 4, "vocab_size": 1024, "tie_word_embeddings": True}
ONE_B: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
ONE_B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256}
EIGHT_B: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
EIGHT_B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
LENGTH = {"max_position_embeddings": 8192}
M = "megatron_fsdp"


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        name: also the name of its folder.
        size: small (fp32), one_b or eight_b (bf16).
        strategy: as `Trainer` takes it.
        steps: total number of optimizer steps.
        resume: name of the case whose checkpoint (of step 3) it resumes from.
        against: name of the case whose losses its own are held against.
        tolerance: largest relative difference of a loss that is right.
        limit: seconds.
    """

    name: str
    size: str
    strategy: str
    steps: int
    lora: bool = False
    resume: str = ""
    against: str = ""
    tolerance: float = 1e-5
    limit: int = 30


def small(name: str, strategy: str, **options: Any) -> Case:
    return Case(name, "small", strategy, 5, **{"against": "fsdp2", **options})


GROUPS: list[list[Case]] = [
    [
        small("fsdp2", "fsdp2", against="", limit=60),
        small("zero3", M, limit=60),
        small("zero2", f"{M}:zero_stage=2"),
        small("zero1", f"{M}:zero_stage=1"),
        small("fsdp2 -> zero3", M, resume="fsdp2"),
        small("zero3 -> fsdp2", "fsdp2", resume="zero3"),
        small("zero1 -> zero3", M, resume="zero1"),
        small("lora fsdp2", "fsdp2", lora=True, against=""),
        small("lora zero3", M, lora=True, against="lora fsdp2"),
        small("zero3 activation_checkpointing", f"{M}:activation_checkpointing=full"),
        small("zero3 cp2", f"{M}:cp=2"),
        small("zero3 tp2", f"{M}:tp=2"),
        small("zero3 replicas", f"{M}:dp_replicate=2"),
        small("zero3 double_buffer", f"{M}:double_buffer=true"),
        small("zero1 no overlap", f"{M}:zero_stage=1,overlap_grad_reduce=false,overlap_param_gather=false"),
        small("zero0", f"{M}:zero_stage=0"),
    ],
    [
        Case("1B fsdp2", "one_b", "fsdp2", 50, limit=60),
        Case("1B zero3", "one_b", M, 50, against="1B fsdp2", tolerance=2e-2, limit=50),
        Case("1B zero2", "one_b", f"{M}:zero_stage=2", 50, against="1B fsdp2", tolerance=2e-2, limit=40),
        Case("1B zero1", "one_b", f"{M}:zero_stage=1", 50, against="1B fsdp2", tolerance=2e-2, limit=40),
    ],
    [
        Case("1B lora fsdp2", "one_b", "fsdp2", 20, lora=True, limit=75),
        Case("1B lora zero3", "one_b", M, 20, lora=True, against="1B lora fsdp2", tolerance=2e-2, limit=50),
    ],
    [Case("8B fsdp2", "eight_b", "fsdp2:activation_checkpointing=full", 7, limit=80)],
    [Case("8B zero3", "eight_b", f"{M}:activation_checkpointing=full", 7, limit=80)],
    [Case("8B zero2", "eight_b", f"{M}:zero_stage=2,activation_checkpointing=full", 7, limit=80)],
]


# --- in the two processes -------------------------------------------------------------------------------------------


def tokenizer() -> Any:
    """A byte tokenizer, so that nothing needs to be downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def texts(count: int) -> list[dict[str, str]]:
    """Sources of the standard library, in alphabetical order."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:count]
    return [{"text": file.read_text(errors="ignore")} for file in files]


def base(size: str, root: Path) -> Path:
    """A safetensors checkpoint with random weights. Rank 0 creates it once on its GPU."""
    import torch
    import transformers

    folder = root / f"base-{size}"
    if int(os.environ["RANK"]) == 0 and not (folder / "done").exists():
        torch.manual_seed(0)
        shape = {**(SMALL if size == "small" else ONE_B), **LENGTH}
        dtype = torch.float32 if size == "small" else torch.bfloat16
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(dtype)
        model.save_pretrained(folder, max_shard_size="1GB")
        tokenizer().save_pretrained(folder)
        (folder / "done").touch()
    while not (folder / "done").exists():
        time.sleep(0.1)
    return folder


def run(case: Case, root: Path) -> dict[str, Any]:
    """Train, and return the losses, the tokens per second of all GPUs, and the peak memory of one."""
    import torch
    from lightning.pytorch.callbacks import Callback
    from transformers import LlamaConfig, LlamaForCausalLM

    from automodel_trainer import (
        AutoModelForCausalLM,
        CausalLMModule,
        LoRAConfig,
        MockDataModule,
        TextDataModule,
        Trainer,
    )
    from automodel_trainer.callbacks import DCPCheckpoint, Throughput
    from automodel_trainer.models._masks import packing_without_sync
    from automodel_trainer.nn.deferred_logits import defer_logits

    class Curve(Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if case.size != "eight_b":
                self.losses.append(float(trainer.callback_metrics["train_loss"]))

    class Random(CausalLMModule):
        """Random weights, drawn shard by shard on the GPU."""

        def configure_model(self) -> None:
            if self.model is None:
                config = LlamaConfig(**EIGHT_B, **LENGTH)
                self.model = AutoModelForCausalLM.from_config(config, self.strategy, seed=1).train()
                packing_without_sync(self.model)
                defer_logits(self.model)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(1)
    lora = LoRAConfig(rank=16) if case.lora else None
    data: Any
    if case.size == "eight_b":
        with torch.device("meta"):
            module: Any = Random(LlamaForCausalLM(LlamaConfig(**EIGHT_B, **LENGTH)), lr=1e-5)
        data = MockDataModule(vocab_size=128256, seq_len=8192, micro_batch_size=1, global_batch_size=2, num_samples=64)
    else:
        is_small = case.size == "small"
        rows = {"seq_len": 256, "micro_batch_size": 2, "global_batch_size": 8} if is_small else {"seq_len": 2048}
        rows = {"micro_batch_size": 2, "global_batch_size": 8, **rows}
        data = TextDataModule(texts(20 if is_small else 100), tokenizer=tokenizer(), cache=False, **rows)
        lr = 1e-3 if is_small or lora else 1e-4
        module = CausalLMModule(base(case.size, root), lora=lora, lr=lr, scheduler="constant")
    curve, throughput = Curve(), Throughput()
    checkpoints = (
        [DCPCheckpoint(every_n_steps=3, save_at_end=False)] if case.name in ("fsdp2", "zero3", "zero1") else []
    )
    trainer = Trainer(
        strategy=case.strategy,
        devices=GPUS,
        precision="fp32" if case.size == "small" else "bf16",
        max_steps=case.steps,
        log_every_n_steps=3 if case.size == "eight_b" else 1,
        default_root_dir=root / case.name.replace(" ", "_"),
        callbacks=[curve, throughput, *checkpoints],
        enable_checkpointing=bool(checkpoints),
        enable_progress_bar=False,
        logger=False,
    )
    begun = time.perf_counter()
    saved = root / case.resume / "checkpoints" / "step-00000003" if case.resume else None
    trainer.fit(module, data, ckpt_path=saved)
    kept = ("tokens_per_second", "tokens_per_second_per_device", "mfu", "peak_memory_gib")
    numbers = {name: round(float(throughput.last[name]), 3) for name in kept if name in throughput.last}
    return {"losses": curve.losses, "seconds": round(time.perf_counter() - begun, 1), **numbers}


def worker(names: list[str], root: Path) -> None:
    import faulthandler
    import gc

    import torch

    faulthandler.register(signal.SIGUSR2)  # prints the stacks if a case exceeds its limit
    cases = {case.name: case for group in GROUPS for case in group}
    first = int(os.environ["RANK"]) == 0
    for name in names:
        if first:
            print("CASE " + name, flush=True)
        try:
            result = run(cases[name], root)
        except BaseException:
            print("FAILED " + json.dumps(traceback.format_exc()[-3500:]), flush=True)
            os._exit(1)  # the other process may wait for this one
        if first:
            print("RESULT " + json.dumps(result), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    os._exit(0)


# --- in the process that was called -----------------------------------------------------------------------------------


def start(names: list[str], root: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(GPUS), "LOCAL_WORLD_SIZE": str(GPUS), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "benchmark", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    shared |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--root", str(root), "--cases", json.dumps(names)]
    processes = []
    for rank in range(GPUS):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        error = (root / f"rank{rank}.log").open("a")
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=error, text=True, bufsize=1)
        )
    return processes


def forward_lines(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")


def watch(group: list[Case], root: Path, deadline: float, results: dict[str, Any]) -> list[str]:
    """Run the cases of a group in one pair of processes. Returns the cases that did not run."""
    names = [case.name for case in group]
    limits = {case.name: case.limit for case in group}
    processes = start(names, root)
    lines: queue.Queue[str] = queue.Queue()
    for process in processes:
        threading.Thread(target=forward_lines, args=(process, lines), daemon=True).start()
    current, until, trouble, open_pipes = "", time.time() + START, "", GPUS
    while open_pipes and not trouble:
        try:
            line = lines.get(timeout=max(0.1, min(until, deadline) - time.time()))
        except queue.Empty:
            trouble = "ran past its limit"
            for process in processes:
                process.send_signal(signal.SIGUSR2)
            time.sleep(2)
            break
        if not line:
            open_pipes -= 1
        elif line.startswith("CASE "):
            current = line[5:].strip()
            until = time.time() + limits[current]
        elif line.startswith("RESULT "):
            results[current] = json.loads(line[7:])
            report(next(case for case in group if case.name == current), results)
            names.remove(current)
            current, until = "", time.time() + START
        elif line.startswith("FAILED "):
            trouble = json.loads(line[7:])
    for process in processes:
        process.kill()
        process.wait()
    if names and not trouble:
        trouble = "the processes ended: " + (root / "rank0.log").read_text()[-1500:]
    if trouble:
        failed = current or names[0]
        logs = "" if "Traceback" in trouble else "\n".join(f.read_text()[-2500:] for f in sorted(root.glob("*.log")))
        results[failed] = {"failed": trouble + logs}
        print(f"{failed}: FAILED: {trouble}\n{logs}", flush=True)
        names.remove(failed)
    return names


def report(case: Case, results: dict[str, Any]) -> None:
    """Compare a result with the one that it must equal, and print both in a line."""
    result = results[case.name]
    losses, other = result["losses"], results.get(case.against, {}).get("losses")
    verdict = ""
    if other:
        other = other[-len(losses) :]  # a resumed run has only the last steps
        worst = max(abs(a - b) / b for a, b in zip(losses, other))
        result["worst_relative_difference"] = worst
        result["right"] = worst <= case.tolerance
        verdict = f"{'ok' if result['right'] else 'WRONG'}: {worst:.1e} from {case.against!r}; "
    rest = {key: value for key, value in result.items() if key not in ("losses", "worst_relative_difference", "right")}
    curve = f" loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps;" if losses else ""
    print(f"{case.name}: {verdict}{curve} {rest}", flush=True)


def everything(only: str, out: Path) -> None:
    root, results = Path(tempfile.mkdtemp()), {}
    deadline = time.time() + BUDGET
    for group in GROUPS:
        left = [case for case in group if re.search(only, case.name)]
        while left:
            if time.time() > deadline - 15:
                print("no time for", [case.name for case in left], flush=True)
                break
            again = watch(left, root, deadline, results)
            left = [case for case in left if case.name in again]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1))
    wrong = [name for name, result in results.items() if "failed" in result or result.get("right") is False]
    print("wrong or failed:", wrong or "nothing", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="a regular expression: run the cases whose names match")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "/tmp")) / "megatron_fsdp_vs_fsdp2.json")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--cases")
    args = parser.parse_args()
    if args.cases:
        worker(json.loads(args.cases), args.root)
    else:
        everything(args.only, args.out)


if __name__ == "__main__":
    main()
