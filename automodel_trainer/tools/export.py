"""`amt export`: write a checkpoint as a model folder, and check that it computes the same.

amt export runs/sft/checkpoints/latest --output model --dtype bfloat16 --check --gguf
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

from automodel_trainer.auto import builder
from automodel_trainer.checkpoint.sources import is_adapter, model_folder
from automodel_trainer.checkpoint.weight_stream import Weights
from automodel_trainer.models.auto_classes import auto_class_of_folder, auto_class_of_task, transformers_class
from automodel_trainer.models.files import resolve_folder
from automodel_trainer.models.lora import LoRAConfig
from automodel_trainer.models.lora.adapter_files import read_config
from automodel_trainer.models.lora.config_changes import read_changes
from automodel_trainer.models.sidecars import has_tokenizer
from automodel_trainer.tools._gguf import check_gguf_can_be_written, write_gguf
from automodel_trainer.tools.check_export import check_export
from automodel_trainer.tools.merge import arguments, merge_as_asked
from automodel_trainer.tools.serve_check import ENGINES, check_engine, compare_served

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1, 2, 4, 8, 16, 32, 64,",
    "Müßiggang ist aller Laster Anfang. 千里之行，始于足下。",
)
# The maximum mean divergence caused by rounding the weights once, in nats per token. A lost or swapped tensor causes
# more than any of these.
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}


@dataclass
class Comparison:
    """How much the predictions of a source and its export differ, token by token (the next token, or a class).

    Attributes:
        mean: mean Kullback-Leibler divergence of the export from the source, in nats per token.
        largest: the largest divergence of a token, in nats.
        same_first: share of tokens for which both predict the same most likely class.
        tokens: number of tokens compared.
        limit: maximum of `mean` for the export's dtype.
    """

    mean: float
    largest: float
    same_first: float
    tokens: int
    limit: float

    def __str__(self) -> str:
        return (
            f"KL(source ‖ export) over {self.tokens} tokens of {len(PROMPTS)} prompts: mean {self.mean:.2e}, largest "
            f"{self.largest:.2e} nats (limit of the mean: {self.limit:.0e}); the most likely token is the same for "
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
    """Load both models in fp32 on the CPU, one at a time, and compare their predictions for fixed prompts.

    The exported model is loaded with plain transformers.

    Args:
        source: the checkpoint, model or adapter that was exported.
        exported: the exported folder.
        base: base model of an adapter. None: the one that the adapter's config names.
        trust_remote_code: run model code that comes with the models.

    Raises:
        ValueError: a model cannot be loaded.
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
    lora, auto_class, changes = None, None, {}
    if is_adapter(folder):
        lora, config, changes = LoRAConfig(adapter=str(folder)), read_config(folder), read_changes(folder)
        folder = resolve_folder(base or config["base_model_name_or_path"])
        of_base = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        auto_class = auto_class_of_task(config.get("task_type"), of_base)
    auto_class = auto_class or auto_class_of_folder(folder, trust_remote_code=trust_remote_code)
    return (
        builder(auto_class)
        .from_pretrained(folder, dtype=torch.float32, lora=lora, trust_remote_code=trust_remote_code, **changes)
        .eval()
    )


def _log_probs(model: transformers.PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities of the classes (of the next token, say) at each token of `ids` `[1, s]`: fp32 `[s, classes]`.

    Raises:
        ValueError: the model predicts one thing for the whole prompt.
    """
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    if logits.ndim != 3:
        raise ValueError(f"--check compares predictions for each token, and {type(model).__name__} makes none.")
    return logits[0].float().log_softmax(-1)


def _prompts(folder: Path, trust_remote_code: bool) -> list[Tensor]:
    """Token ids of the prompts, `[1, s]` each. For a model without a tokenizer, random ids."""
    if has_tokenizer(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return [tokenizer(text, return_tensors="pt")["input_ids"] for text in PROMPTS]
    size = json.loads((folder / "config.json").read_text()).get("vocab_size", 1000)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(size, (1, 16), generator=generator) for _ in PROMPTS]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        ValueError: with --check, the export does not compute the same as the source.
    """
    parser = arguments("amt export", "Write a checkpoint, or an adapter and its base model, for any program to load.")
    parser.add_argument("--check", action="store_true", help="load it with transformers and compare with the source")
    parser.add_argument("--gguf", action="store_true", help="also write model.gguf, read back with transformers")
    parser.add_argument("--serve", choices=ENGINES, help="compare log-probabilities with those of a serving engine")
    args = parser.parse_args(argv)
    if args.gguf:
        check_gguf_can_be_written()
    if args.serve:
        check_engine(args.serve)
    folder = merge_as_asked(args)
    print(f"Exported to {folder}.")
    if args.gguf:
        print(f"Wrote {write_gguf(folder)}: transformers reads the same weights and config from it.")
    if args.check:
        findings = check_export(args.source, folder, args.base, args.trust_remote_code)
        print("\n".join(map(str, findings)))
        if faults := [finding for finding in findings if finding.fault]:
            raise ValueError(f"{folder} is not what {args.source} is. " + " ".join(f"{f}." for f in faults))
        result = compare(args.source, folder, args.base, trust_remote_code=args.trust_remote_code)
        print(result)
        if not result.mean <= result.limit:
            raise ValueError(
                f"{folder} does not compute the same as {args.source}: {result}. Do not use it. If rounding to --dtype "
                "is the cause, export without --dtype."
            )
    if args.serve:
        served = compare_served(folder, [ids[0].tolist() for ids in _prompts(folder, args.trust_remote_code)])
        print(served)
        if not served.mean <= served.limit:
            raise ValueError(f"{args.serve} computes something else of {folder}: {served}.")
