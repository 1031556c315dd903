"""`amt export --serve vllm`: the log-probabilities of fixed prompts through vLLM's offline engine and transformers."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

ENGINES = ("vllm",)
LIMIT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest mean difference of a token's log-probability, in nats, that kernels and rounding explain."""


@dataclass(frozen=True)
class Served:
    """How far two programs are apart.

    Attributes:
        mean: mean absolute difference of a token's log-probability, in nats.
        largest: the largest.
        tokens: number of tokens compared.
        limit: of the mean.
    """

    mean: float
    largest: float
    tokens: int
    limit: float

    def __str__(self) -> str:
        return (
            f"vLLM and transformers: log-probabilities of {self.tokens} tokens differ by {self.mean:.2e} nats in the "
            f"mean, {self.largest:.2e} at most (limit of the mean: {self.limit:.0e})"
        )


def check_engine(name: str) -> None:
    """Raise ValueError if the engine is not installed."""
    if find_spec(name) is None:
        raise ValueError(
            f"--serve {name} runs the export in {name}'s offline engine, and the package {name} is not installed. "
            f"Install it ({name} needs a GPU or its CPU build), or leave --serve out."
        )


def compare_served(folder: Path, prompts: list[list[int]]) -> Served:
    """Run the prompts through vLLM and through transformers.

    Args:
        folder: an exported model.
        prompts: token ids of each.

    Raises:
        ValueError: vLLM is missing.
    """
    check_engine("vllm")
    vllm: Any = __import__("vllm")
    engine = vllm.LLM(model=str(folder), enforce_eager=True, seed=0, skip_tokenizer_init=True)
    parameters = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], parameters)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    differences = []
    for ids, output in zip(prompts, outputs):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        own = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        served = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ids[1:])]
        differences.append((torch.tensor(served) - own).abs())
    found = torch.cat(differences)
    limit = LIMIT.get(next(model.parameters()).dtype, max(LIMIT.values()))
    return Served(found.mean().item(), found.max().item(), len(found), limit)
