"""Train all parameters of a llama-8B-shaped model on 2 GPUs under FSDP2: `Trainer` against a bare loop, bf16 and fp8.

`python benchmarks/full_8b.py` runs each case in its own processes on the same GPUs. It prints every step and, at the
end, tok/s per GPU, peak memory and the ratios to the bare loop (goals: 10,000 tok/s in bf16, 14,500 in fp8). Compare:
"ours, fp8" with "ours, fp8, bf16 gather" (the gain of `kernels.fp8_all_gather`), both with "peer, fp8", and "ours, te
fp8" with all of them. Check that our mean losses in bf16 and fp8 agree. "Weights kept" means that weights are not
gathered again in the backward (`reshard_after_forward: false`).

Use `--micro-batch-size 1` to save memory, or 3 if there is memory left; `--profile DIR` for the kernels of one more
step; `--limit` for the seconds of a case (steps measured until then count); `--layers 8` for a quick try; and `--tiny`
for CPU ranks with emulated fp8. On one GPU (`--gpus 1`), runs with 8 and 16 layers together show the time of a layer
without communication; 139 GiB are enough for 16 layers and their optimizer state. `--imagined` runs one rank of
`--gpus` on one GPU and imagines the others; it leaves out the network (see `imagined.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from imagined import imagine
from lora_8b import EIGHT_B, TINY, Moment, synchronize
from torch import Tensor, nn

OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, fp8": {"fp8": "tensorwise"},
    "ours, fp8, bf16 gather": {"fp8": "tensorwise", "fp8_all_gather": False},
    "ours, fp8, weights kept": {"fp8": "tensorwise"},
    "ours, te fp8": {"linear": "te", "fp8": "delayed"},
}
PEERS: dict[str, dict[str, Any] | None] = {
    "peer": None,
    "peer, fp8": {},
    "peer, fp8, torchao's gather": {"enable_fsdp_float8_all_gather": True},
}
DEFAULT = [*OURS, "peer", "peer, fp8"]
WARMUP = 2
LR = 1e-5


class Steps:
    """Times steps with events on the device, and profiles one more step at the end.

    It prints a step after the next two are launched, so the host never waits for the device in between.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.profiler = args, None
        self.moments: list[Moment] = []

    def begin(self) -> None:
        if not self.moments:
            self.moments.append(Moment(wait=True))
        elif self.args.profile and self._ended == self.args.steps and rank() == 0:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            synchronize()
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()

    def end(self) -> None:
        if self._ended == self.args.steps:
            self._write()
            return
        self.moments.append(Moment())
        if self._ended > 2:
            self._say(self._ended - 2)

    def finish(self, loss: float) -> None:
        """The results so far. `loss` is the mean over all steps."""
        for step in range(max(self._ended - 1, 1), self._ended + 1):
            self._say(step)
        say(f"{self.args.case}: mean loss {loss:.4f}")

    @property
    def _ended(self) -> int:
        return len(self.moments) - 1

    def _say(self, step: int) -> None:
        seconds = self.moments[step].since(self.moments[step - 1])
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        if rank() == 0:
            print("STEP " + json.dumps({"seconds": round(seconds, 4), "peak_gib": round(peak, 1)}), flush=True)

    def _write(self) -> None:
        from automodel_trainer.tools.bench_profile import kernels_of, table

        if self.profiler is not None:
            synchronize()
            self.profiler.stop()
            folder = Path(self.args.profile)
            folder.mkdir(parents=True, exist_ok=True)
            name = self.args.case.replace(", ", "_").replace(" ", "-")
            (folder / f"{name}.md").write_text(table(kernels_of(self.profiler, 1, most=45)))

    @property
    def total(self) -> int:
        return self.args.steps + (1 if self.args.profile else 0)


def ours(args: argparse.Namespace) -> None:
    from lightning.pytorch.callbacks import Callback
    from transformers import AutoModelForCausalLM as Transformers
    from transformers import LlamaConfig

    from automodel_trainer import AutoModelForCausalLM, CausalLMModule, KernelsConfig, MockDataModule, Trainer
    from automodel_trainer.models._masks import packing_without_sync
    from automodel_trainer.models.kernels import choose as kernels
    from automodel_trainer.models.quantization.fp8_layers import fp8_layers
    from automodel_trainer.nn.deferred_logits import defer_logits

    shape = LlamaConfig(**args.shape, max_position_embeddings=args.seq_len)
    if args.tiny:
        kernels.convert_to_fp8 = partial(kernels.convert_to_fp8, emulate=True)

    class RandomModel(CausalLMModule):
        def configure_model(self) -> None:
            if self.model is None:
                self.model = AutoModelForCausalLM.from_config(shape, self.strategy, seed=1, kernels=self.kernels)
                packing_without_sync(self.model)
                defer_logits(self.model)
                self.model.train()
                say(f"{args.case}: {fp8_layers(self.model) or 'no fp8'}")

    class Clock(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            steps.begin()

        def on_train_batch_end(self, *_: Any) -> None:
            steps.end()

    steps = Steps(args)
    data = MockDataModule(
        vocab_size=args.shape["vocab_size"],
        seq_len=args.seq_len,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.gpus * args.micro_batch_size,
        num_samples=args.gpus * args.micro_batch_size * steps.total,
    )
    trainer = Trainer(
        strategy="fsdp2:reshard_after_forward=false" if "kept" in args.case else "fsdp2",
        devices=1 if args.imagined else "auto",
        num_nodes=args.gpus if args.imagined else 1,
        precision="bf16",
        max_steps=steps.total,
        log_every_n_steps=args.steps,
        default_root_dir=args.root,
        callbacks=[Clock()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    with torch.device("meta"):
        meta = Transformers.from_config(shape)
    trainer.fit(RandomModel(meta, kernels=KernelsConfig(**OURS[args.case]), lr=LR), data)
    steps.finish(float(trainer.callback_metrics["train_loss"]))


class WithLoss(nn.Module):
    """A model and its loss, which computes the logits of 2,048 tokens at a time."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        pairs = zip(hidden.split(2048), targets.flatten().split(2048))
        parts = [torch.utils.checkpoint.checkpoint(self.part, h, t, use_reentrant=False) for h, t in pairs]
        return torch.stack(parts).sum() / targets.numel()

    def part(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model.lm_head(hidden).float(), targets, reduction="sum")


def peer(args: argparse.Namespace) -> None:
    """A bare loop: FSDP2 and compilation per block, fp32 weights and Adam state, bf16 compute."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    net = _peer_model(args)
    policy: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    for block in net.model.model.layers:
        if device.type == "cuda":
            block.compile()
        fully_shard(block, **policy)
    fully_shard(net.model.model.embed_tokens, **policy)
    fully_shard(net, reshard_after_forward=False, **policy)
    net.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            local = parameter.to_local()  # type: ignore[operator]
            local.fill_(1.0) if "norm" in name else local.normal_(0, 0.02)
    rotary = net.model.model.rotary_emb
    net.model.model.rotary_emb = type(rotary)(config=net.model.config).to(device)  # its frequencies are still on meta
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, fused=True)
    steps, generator = Steps(args), torch.Generator(device).manual_seed(rank())
    losses: list[Tensor] = []
    shape = (args.micro_batch_size, args.seq_len)
    for _ in range(steps.total):
        ids = torch.randint(args.shape["vocab_size"], shape, device=device, generator=generator)
        steps.begin()
        loss = net(ids, ids.roll(-1, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if PEERS[args.case]:
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

            precompute_float8_dynamic_scale_for_fsdp(net)
        steps.end()
        losses.append(loss.detach())
    steps.finish(float(torch.stack(losses[: args.steps]).mean()))
    dist.destroy_process_group()


def _peer_model(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        config = LlamaConfig(**args.shape, max_position_embeddings=args.seq_len)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    options = PEERS[args.case]
    if options is not None:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig(emulate=args.tiny, **options)  # tensorwise
        convert_to_float8_training(model.model, config=config)
    return WithLoss(model).train()


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def say(text: str) -> None:
    if rank() == 0:
        print("SAY " + text, flush=True)


def launch(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run a case in its own processes for at most `--limit` seconds, and return its steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.gpus), "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [sys.executable] if args.imagined else command
    command += [__file__, "--case", case, *args.passed]
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **output)
    timer = threading.Timer(args.limit, lambda: os.killpg(process.pid, signal.SIGKILL))
    timer.start()
    began, steps, others = time.monotonic(), [], []
    assert process.stdout is not None
    for line in process.stdout:
        kind, _, rest = line.strip().partition(" ")
        if kind == "STEP":
            steps.append(json.loads(rest))
            print(f"  {case}, step {len(steps)}, at {time.monotonic() - began:.0f} s: {rest}", flush=True)
        elif kind == "SAY":
            print(f"  {rest}", flush=True)
        else:
            others.append(line)
    code = process.wait()
    timer.cancel()
    if code:
        print(f"  {case} ended with {code} after {time.monotonic() - began:.0f} s (limit {args.limit})", flush=True)
        ends = [index for index, line in enumerate(others) if "failed (exitcode" in line]
        print("".join(others[: min(ends, default=len(others))])[-4000:], flush=True)  # then torchrun's own
    return figures(args, steps)


def figures(args: argparse.Namespace, steps: list[dict[str, Any]]) -> dict[str, Any]:
    times = sorted(step["seconds"] for step in steps[WARMUP:])
    if not times:
        return {}
    median = times[len(times) // 2]
    return {
        "tokens_per_second_per_gpu": round(args.micro_batch_size * args.seq_len / median, 1),
        "spread": round((times[-1] - times[0]) / median, 4),
        "peak_gib": max(step["peak_gib"] for step in steps),
        "first_step_s": round(steps[0]["seconds"], 1),
        "measured_steps": len(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    cases = [*OURS, *PEERS]
    parser.add_argument("--case", choices=cases)
    parser.add_argument("--cases", nargs="*", default=None, choices=cases)
    parser.add_argument("--steps", type=int, default=8, help=f"of a case; the first {WARMUP} do not count")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=2, help="or CPU ranks")
    parser.add_argument("--imagined", action="store_true", help="run one rank, with the others imagined")
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0: all")
    parser.add_argument("--profile", help="a folder for a table of kernels per case")
    parser.add_argument("--limit", type=float, default=100, help="seconds of a case")
    parser.add_argument("--root", default=None)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.root = args.root or tempfile.mkdtemp()
    args.shape = {**(TINY if args.tiny else EIGHT_B)}
    args.shape["num_hidden_layers"] = args.layers or args.shape["num_hidden_layers"]
    if args.case:
        if args.imagined:
            imagine(args.gpus)
        (ours if args.case in OURS else peer)(args)
        return
    sizes = {"steps": args.steps, "seq-len": args.seq_len, "micro-batch-size": args.micro_batch_size}
    given = {**sizes, "gpus": args.gpus, "layers": args.layers, "root": args.root}
    given |= {"profile": args.profile} if args.profile else {}
    args.passed = [*(str(part) for key, value in given.items() for part in (f"--{key}", value))]
    args.passed += [f"--{flag}" for flag in ("tiny", "imagined") if getattr(args, flag)]
    default = [case for case in DEFAULT if not (args.tiny and "te " in case)]
    results = {case: launch(case, args) for case in args.cases or default}
    for case, result in results.items():
        print(case, json.dumps(result) if result else "failed", flush=True)
    speeds = {case: result["tokens_per_second_per_gpu"] for case, result in results.items() if result}
    for case, speed in speeds.items():
        for other in speeds:
            if case in OURS and other != case and (other in PEERS or "gather" in other):
                print(f"{case} / {other}: {speed / speeds[other]:.3f}", flush=True)


if __name__ == "__main__":
    main()
