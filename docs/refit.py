"""Train a sharded model a little, hand its weights to an inference engine, and check that both compute the same.

torchrun --nproc-per-node 2 docs/refit.py my-model                  # the engine is a stand-in: plain transformers
torchrun --nproc-per-node 2 docs/refit.py my-model --engine vllm    # rank 0 runs vLLM's offline engine

The engine starts with the weights of the folder and gets the trained ones by name, one whole tensor at a time, as RL
loops do after each update. The tests run the stand-in. vLLM 0.23 was run by hand on one H200 (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from automodel_trainer import AutoModelForCausalLM, LoRAConfig, stream_weights, weight_info
from automodel_trainer.strategies import StrategyRegistry

PROMPTS = [[7, 8, 9, 10, 11, 12], [30, 20, 10, 40], [99, 98, 97, 96, 95, 94, 93, 92]]


class Engine(Protocol):
    """An inference engine as an RL loop sees it."""

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Replace the weights, by their names in the checkpoint."""

    def log_probs(self, prompt: list[int]) -> Tensor:
        """The log-probability of each token of a prompt after the first, fp32 `[len(prompt) - 1]`."""


class StandIn:
    """Plain transformers in place of an engine. It takes exactly the names and shapes that were announced."""

    def __init__(self, folder: str, dtype: torch.dtype, expected: dict[str, Any]) -> None:
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.dtype, self.expected = dtype, expected

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Replace the weights; raises ValueError for one that was not announced, or did not come."""
        came = {}
        for name, tensor in weights:
            if name not in self.expected or (tensor.shape, tensor.dtype) != self.expected[name]:
                raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} was not announced.")
            came[name] = tensor.cpu().clone()  # an engine copies into memory of its own, as this does
        if missing := self.expected.keys() - came.keys():
            raise ValueError(f"{sorted(missing)} did not come.")
        cls, config = type(self.model), self.model.config
        self.model = cls.from_pretrained(None, config=config, state_dict=came, dtype=self.dtype).eval()

    @torch.no_grad()
    def log_probs(self, prompt: list[int]) -> Tensor:
        """See `Engine`."""
        logits = self.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


class VLLM:
    """vLLM's offline engine in this process, on one GPU."""

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine takes tensors of this process
        import vllm

        self.sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        name = str(dtype).removeprefix("torch.")
        self.engine = vllm.LLM(
            folder, dtype=name, enforce_eager=True, gpu_memory_utilization=0.3, skip_tokenizer_init=True
        )

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Give the worker's model the weights. It splits and stacks them itself, as for a file."""
        self.engine.collective_rpc(lambda worker: worker.model_runner.model.load_weights(weights))

    def log_probs(self, prompt: list[int]) -> Tensor:
        """See `Engine`."""
        (output,) = self.engine.generate([{"prompt_token_ids": prompt}], self.sampling)
        found = zip(output.prompt_logprobs[1:], prompt[1:])
        return torch.tensor([step[token].logprob for step, token in found])


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Returns how far a token's log-probability moved, and how far the engine is from the trained model, in nats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or Hub id")
    parser.add_argument("--strategy", default="fsdp2")
    parser.add_argument("--lora", type=int, help="train adapters of this rank; the engine gets the merged weights")
    parser.add_argument("--engine", choices=["stand-in", "vllm"], default="stand-in")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the engine")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)

    strategy: Any = StrategyRegistry.get(args.strategy).start()
    lora = LoRAConfig(rank=args.lora) if args.lora else None
    model = AutoModelForCausalLM.from_pretrained(args.model, strategy, lora=lora).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    ids = torch.tensor([PROMPTS[2]] * 2 * strategy.dp_size, device=strategy.root_device)[
        strategy.dp_rank :: strategy.dp_size
    ]
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    expected = weight_info(model, dtype)  # collective, as everything below that touches the model
    engine: Engine | None = None
    if strategy.global_rank == 0:
        engine = VLLM(args.model, dtype) if args.engine == "vllm" else StandIn(args.model, dtype, expected)
    before = [engine.log_probs(prompt) for prompt in PROMPTS] if engine is not None else []

    weights = stream_weights(model, dtype)
    if engine is not None:
        engine.load(weights)
    for _ in weights:  # every rank takes every tensor; only rank 0 has a use for them
        pass

    largest = moved = 0.0
    model.eval()
    for number, prompt in enumerate(PROMPTS):
        tokens = torch.tensor([prompt], device=strategy.root_device)
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        trained = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].cpu()
        if engine is not None:
            served = engine.log_probs(prompt)
            largest = max(largest, float((served - trained).abs().max()))
            moved = max(moved, float((served - before[number]).abs().max()))
    if engine is not None:
        print(f"{len(expected)} tensors. The engine's log-probabilities moved by {moved:.3f} nats, and differ from the")
        print(f"trained model's by {largest:.1e} nats at most.")
    strategy.stop()
    return moved, largest


if __name__ == "__main__":
    main()
