"""TRL's SFTTrainer and GRPOTrainer on a llama-1B shape, sharded over 2 GPUs: our model against transformers' own.

`python benchmarks/trl_1b.py` runs each case under torchrun in its own processes on the same GPUs. It prints a line
`RESULT {...}` for each, with the reason if a case cannot run, and at the end the ratios of ours to each peer. All cases
load the same random checkpoint (bf16 on disk) and get the same trainer, rows and batch. They hold fp32 weights, compute
in bf16 (mixed precision of FSDP2) and reduce gradients as each side does. `--weights bf16` trains bf16 weights.

| side | what TRL gets |
| --- | --- |
| ours | our `AutoModelForCausalLM` under `FSDP2Strategy`: compiled blocks, `KernelsConfig()` |
| ours, sdpa | the same with transformers' kernels in the compiled blocks |
| ours, eager | the same without compiled blocks |
| ours, static | ours, and GRPO generates with a static cache: the step of a token is replayed |
| transformers | transformers' model under `DistributedConfig(fsdp_size=...)` |
| transformers, compiled | the same, and `torch_compile=True` |
| transformers, static | transformers, and GRPO generates with a static cache |
| accelerate | transformers' whole model, which accelerate shards by FSDP2 (`fsdp=True`) |

TRL computes the loss itself, in chunks of tokens and of the vocabulary. It reads the head's weight, so the loss of a
model (our chunked loss too) is not used on any side. SFT rows have `--seq-len` random tokens, all supervised. GRPO
generates with transformers' `generate`: prompts of 64 tokens, exactly 128 new ones, 4 for a prompt; its tokens/s counts
both. `--tiny` is for two gloo ranks on a CPU, where blocks are only traced, and accelerate does not shard.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from cases import report, result_of
from lora_8b import TINY, Moment, synchronize

ONE_B: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
ONE_B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5}
PEERS = ("transformers", "transformers, compiled", "transformers, static", "accelerate")
SIDES = ("ours", "ours, sdpa", "ours, eager", "ours, static", *PEERS)
CASES = tuple(f"{task}: {side}" for task in ("sft", "grpo") for side in SIDES)
DEFAULT = [f"{task}: {side}" for task in ("sft", "grpo") for side in ("ours", "transformers")]
PROMPT, NEW, GENERATIONS = 64, 128, 4
WARMUP = 3  # steps that are not measured
PAD, BOS, EOS = 0, 1, 2


def main() -> None:
    args = arguments()
    if args.save:
        save(args)
    elif args.case:
        rank_of_case(args)
    else:
        compare(args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=DEFAULT, choices=CASES, metavar="CASE", help=f"of {CASES}")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="of a GPU in a step; for GRPO: completions")
    parser.add_argument("--seq-len", type=int, help="of SFT (default: 4096, or 64 with --tiny)")
    parser.add_argument("--weights", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations (TRL's default)")
    parser.add_argument("--timeout", type=int, default=140, help="seconds for a case")
    parser.add_argument("--verbose", action="store_true", help="print the errors of failed cases in full")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # the rest: what a run gives its processes
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = TINY if args.tiny else ONE_B
    args.seq_len = args.seq_len or (64 if args.tiny else 4096)
    return args


# --- the process that starts the others -------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> None:
    passed = [*sys.argv[1:]]
    if "--cases" in passed:
        first = passed.index("--cases")
        passed[first : first + 1 + len(args.cases)] = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, *passed, "--save", folder], check=True)
        results = {case: run_case(args, case, [*passed, "--folder", folder]) for case in args.cases}
    for case, result in results.items():
        task, side = case.split(": ")
        for peer in PEERS:
            other = results.get(f"{task}: {peer}", {})
            if side.startswith("ours") and "error" not in result and "tokens_per_second" in other:
                speed = result["tokens_per_second"] / other["tokens_per_second"]
                memory = f", {result['peak_gib'] / other['peak_gib']:.3f} of its memory" if other["peak_gib"] else ""
                print(f"{case} / {peer}: {speed:.3f} of its tokens/s{memory}", flush=True)


def run_case(args: argparse.Namespace, case: str, passed: list[str]) -> dict[str, Any]:
    """Run a case under torchrun, and print its result or why there is none."""
    began = time.perf_counter()
    lines = 100 if args.verbose else 3
    found = result_of(__file__, [*passed, "--case", case], args.timeout, ranks=args.gpus, lines=lines)
    if isinstance(found, str):
        print(found, flush=True)
        found = {"error": found.partition("\n")[0]}
    result = {"case": case, **found, "process_s": round(time.perf_counter() - began, 1)}
    report(result)
    return result


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def save(args: argparse.Namespace) -> None:
    """Write a random checkpoint in bf16 and a tokenizer with a word `t7` for token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = LlamaConfig(**args.shape, max_position_embeddings=8192, tie_word_embeddings=True, **special)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(args.save)
    words = {f"t{i}": i for i in range(args.shape["vocab_size"])}
    backend = Tokenizer(models.WordLevel(vocab=words, unk_token="t3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": f"t{PAD}", "bos_token": f"t{BOS}", "eos_token": f"t{EOS}", "unk_token": "t3"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(args.save)


# --- a rank of a case -------------------------------------------------------------------------------------------------


def rank_of_case(args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        result = train(args)
    except Exception as error:  # another rank may wait for this one forever: say why, and end at once
        traceback.print_exc()
        text = " ".join(str(error).split())[:400]
        report({"error": f"{type(error).__name__}: {text}"})
        os._exit(1)
    if dist.get_rank() == 0:
        report(result)
    dist.destroy_process_group()


def train(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    task, side = args.case.split(": ")
    began = time.perf_counter()
    model = ours(args, side) if side.startswith("ours") else theirs(args, side)
    loaded = time.perf_counter() - began
    clock = Clock()
    model.generate = clock.timed(model.generate)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    with tempfile.TemporaryDirectory() as folder:
        options = {**common_options(args, folder), **options_of(args, side)}
        trainer = (sft if task == "sft" else grpo)(args, options, model, tokenizer, clock.callback())
        loss = trainer.train().training_loss
    tokens = args.rows * (args.seq_len if task == "sft" else PROMPT + NEW)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    result = {**clock.figures(tokens), "load_s": round(loaded, 1), "mean_loss": round(loss, 6)}
    result["held"] = share_held(trainer.model_wrapped)
    return result | ({"mean_reward": round(sum(rewards) / len(rewards), 4)} if rewards else {})


def share_held(model: Any) -> float:
    """The share of the weights that this rank holds: 1 where nothing is sharded."""
    from torch.distributed.tensor import DTensor

    weights = list(model.parameters())
    local = sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in weights)
    return round(local / sum(w.numel() for w in weights), 3)


def ours(args: argparse.Namespace, side: str) -> Any:
    from automodel_trainer import AutoModelForCausalLM, FSDP2Strategy, KernelsConfig

    compiling = {"compile": False} if "eager" in side else {}
    if args.tiny and not compiling:  # what the GPU compiles can be traced at least
        compiling = {"compile": True, "compile_backend": "aot_eager"}
    strategy = FSDP2Strategy(**compiling)
    strategy.start(precision="bf16-true" if args.weights == "bf16" else "bf16-mixed")
    kernels = {"attn_implementation": "sdpa"} if "sdpa" in side else {"kernels": KernelsConfig()}
    return AutoModelForCausalLM.from_pretrained(args.folder, strategy, **kernels)


def theirs(args: argparse.Namespace, side: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16 if args.weights == "bf16" else torch.float32}
    if side != "accelerate":
        mixed = args.weights == "fp32"
        options["distributed_config"] = DistributedConfig(fsdp_size=args.gpus, fsdp_mixed_precision=mixed)
    return AutoModelForCausalLM.from_pretrained(args.folder, attn_implementation="sdpa", **options)


def common_options(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Of both trainers. bf16=False: the model computes in bf16 by itself, without autocast."""
    return {
        "output_dir": folder, "max_steps": args.steps, "per_device_train_batch_size": args.rows, "bf16": False,
        "learning_rate": 1e-5, "lr_scheduler_type": "constant", "logging_steps": args.steps, "report_to": [],
        "save_strategy": "no", "seed": 1, "disable_tqdm": True, "optim": "adamw_torch_fused",
        "gradient_checkpointing": args.checkpointing, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def options_of(args: argparse.Namespace, side: str) -> dict[str, Any]:
    if side == "accelerate":
        wrap = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
        return {"fsdp": True, "fsdp_config": wrap, "bf16": args.weights == "fp32"}
    return {"torch_compile": True} if "compiled" in side else {}


def sft(args: argparse.Namespace, options: dict[str, Any], model: Any, tokenizer: Any, clock: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = random_ids(args, args.steps * args.rows * args.gpus, args.seq_len).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    config = SFTConfig(**options, max_length=args.seq_len, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock])


def grpo(args: argparse.Namespace, options: dict[str, Any], model: Any, tokenizer: Any, clock: Any) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    prompts = random_ids(args, args.steps * args.rows * args.gpus // GENERATIONS, PROMPT).tolist()
    data = Dataset.from_dict({"prompt": [" ".join(f"t{i}" for i in row) for row in prompts]})
    config = GRPOConfig(
        **options,
        num_generations=GENERATIONS,
        max_completion_length=NEW,
        generation_kwargs={"min_new_tokens": NEW},
        cache_implementation="static" if "static" in args.case else None,
    )
    return GRPOTrainer(
        model, [even_tokens], args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
    )


def even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even tokens in a completion; an error if a completion is short, because speed counts its tokens."""
    assert all(len(ids) == NEW for ids in completion_ids), [len(ids) for ids in completion_ids]
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def random_ids(args: argparse.Namespace, rows: int, length: int) -> torch.Tensor:
    """Random tokens without the special ones; the same on every rank and side."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(4, args.shape["vocab_size"], (rows, length), generator=generator)


class Clock:
    """Times of the steps and of `generate`, by events on the device."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ends: list[Moment] = []
        self.generating: list[tuple[Moment, Moment]] = []
        self.first = 0.0  # seconds until the first step had ended

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class EndOfStep(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.ends.append(Moment(wait=not clock.ends))
                clock.first = clock.first or clock.ends[0].time - clock.began

        return EndOfStep()

    def timed(self, generate: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = Moment()
            out = generate(*args, **kwargs)
            self.generating.append((before, Moment()))
            return out

        return timed

    def figures(self, tokens: int) -> dict[str, Any]:
        """Of the steps after the warmup: the median, and the range relative to it. Memory: the most of any rank."""
        synchronize()
        steps = sorted(after.since(before) for before, after in pairwise(self.ends[WARMUP - 1 :]))
        median = steps[len(steps) // 2]
        peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0)
        peak = peak.cuda() if torch.cuda.is_available() else peak
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        figures = {
            "tokens_per_second": round(tokens / median, 1),
            "step_s": round(median, 4),
            "spread": round((steps[-1] - steps[0]) / median, 4),
            "peak_gib": round(float(peak), 2),
            "until_first_step_s": round(self.first, 1),
        }
        if self.generating:
            spent = sorted(after.since(before) for before, after in self.generating[WARMUP:])
            figures["generate_s"] = round(spent[len(spent) // 2], 4)
        return figures


if __name__ == "__main__":
    main()
