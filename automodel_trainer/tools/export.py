"""`amt export`: a checkpoint as a model folder, and the proof that it computes the same.

amt export runs/sft/checkpoints/latest --output model --dtype bfloat16 --check
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from automodel_trainer.checkpoint.sources import is_adapter, model_folder
from automodel_trainer.checkpoint.weight_stream import Weights
from automodel_trainer.models.auto import builder
from automodel_trainer.models.auto_classes import auto_class_of_folder, auto_class_of_task, transformers_class
from automodel_trainer.models.files import resolve_folder
from automodel_trainer.models.lora import LoRAConfig
from automodel_trainer.models.lora.adapter_files import read_config
from automodel_trainer.models.sidecars import has_tokenizer
from automodel_trainer.tools.merge import arguments, merge_as_asked

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1, 2, 4, 8, 16, 32, 64,",
    "Müßiggang ist aller Laster Anfang. 千里之行，始于足下。",
)
# What rounding the weights once may cost, in nats per token. A lost or swapped tensor costs more than any of these.
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}


@dataclass
class Comparison:
    """Kullback-Leibler divergence of what the exported model predicts at each token (the next token, or a class) from
    what the source does, nats per token."""

    mean: float
    largest: float
    same_first: float
    tokens: int
    limit: float

    def __str__(self) -> str:
        return (
            f"KL(source ‖ export) over {self.tokens} tokens of {len(PROMPTS)} prompts: mean {self.mean:.2e}, largest "
            f"{self.largest:.2e} nats (limit of the mean {self.limit:.0e}); the same most likely token in "
            f"{self.same_first:.1%}"
        )


@torch.no_grad()
def compare(
    source: str | os.PathLike[str],
    exported: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    trust_remote_code: bool = False,
) -> Comparison:
    """Load both, the exported one with plain transformers, and compare what they predict for fixed prompts, in fp32.

    One model is in memory at a time, in fp32 on the CPU.

    Raises:
        ValueError: one of them cannot be loaded.
    """
    prompts = _prompts(Path(exported), trust_remote_code)
    loaded = _load_source(source, base, trust_remote_code)
    reference = [_log_probs(loaded, ids) for ids in prompts]
    del loaded
    auto_class = auto_class_of_folder(exported, trust_remote_code=trust_remote_code)
    options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    model = transformers_class(auto_class).from_pretrained(exported, **options)
    divergences, same = [], []
    for ids, expected in zip(prompts, reference):
        found = _log_probs(model, ids)
        divergences.append((expected.exp() * (expected - found)).sum(-1).clamp(min=0))
        same.append(expected.argmax(-1) == found.argmax(-1))
    kl = torch.cat(divergences)
    dtypes = {dtype for dtype, _ in Weights(Path(exported)).header.values()}
    limit = max((LIMITS[dtype] for dtype in dtypes & LIMITS.keys()), default=max(LIMITS.values()))
    return Comparison(kl.mean().item(), kl.max().item(), torch.cat(same).float().mean().item(), len(kl), limit)


def _load_source(
    source: str | os.PathLike[str], base: str | os.PathLike[str] | None, trust_remote_code: bool
) -> transformers.PreTrainedModel:
    folder = model_folder(source)
    lora, auto_class = None, None
    if is_adapter(folder):
        lora, config = LoRAConfig(adapter=str(folder)), read_config(folder)
        auto_class = auto_class_of_task(config.get("task_type"))
        folder = resolve_folder(base or config["base_model_name_or_path"])
    auto_class = auto_class or auto_class_of_folder(folder, trust_remote_code=trust_remote_code)
    return (
        builder(auto_class)
        .from_pretrained(folder, dtype=torch.float32, lora=lora, trust_remote_code=trust_remote_code)
        .eval()
    )


def _log_probs(model: transformers.PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities of the classes at each token of a prompt (of the next token, say), `[s, classes]`, fp32.

    Raises:
        ValueError: the model predicts one thing for the whole prompt.
    """
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    if logits.ndim != 3:
        raise ValueError(f"--check compares predictions for each token, and {type(model).__name__} makes none.")
    return logits[0].float().log_softmax(-1)


def _prompts(folder: Path, trust_remote_code: bool) -> list[Tensor]:
    """Token ids of the prompts, `[1, s]` each; of a model without a tokenizer the first of its vocabulary."""
    if has_tokenizer(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return [tokenizer(text, return_tensors="pt")["input_ids"] for text in PROMPTS]
    size = json.loads((folder / "config.json").read_text()).get("vocab_size", 1000)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(size, (1, 16), generator=generator) for _ in PROMPTS]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; an export that computes something else is an error."""
    parser = arguments("amt export", "Write a checkpoint, or an adapter and its base model, for any program to load.")
    parser.add_argument("--check", action="store_true", help="load it with transformers and compare with the source")
    args = parser.parse_args(argv)
    folder = merge_as_asked(args)
    print(f"Exported to {folder}.")
    if args.check:
        result = compare(args.source, folder, args.base, trust_remote_code=args.trust_remote_code)
        print(result)
        if not result.mean <= result.limit:
            raise ValueError(
                f"{folder} does not compute what {args.source} does: {result}. Do not use it. If rounding to --dtype "
                "is at fault, export without it."
            )
