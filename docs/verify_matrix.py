"""Write the table of docs/verify.md: the result of `amt verify` for tiny models on many layouts.

python docs/verify_matrix.py            # a few minutes on two cores
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests.tiny

from automodel_trainer import CausalLMModule
from automodel_trainer.models.lora import LoRAConfig
from automodel_trainer.verification.ranks import Processes
from automodel_trainer.verification.verify import verify
from tests.strategies.test_context import rows_of
from tests.tiny import tiny_config, tiny_tokenizer

SIZES = {"num_hidden_layers": 6, "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense, GQA, untied (llama)": ("llama", {}),
    "dense, q/k norms, tied (qwen3)": ("qwen3", {"tie_word_embeddings": True}),
    "the same, LoRA": ("qwen3", {"tie_word_embeddings": True, "lora": LoRAConfig(rank=4)}),
    "q/k/v biases, tied (qwen2)": ("qwen2", {"tie_word_embeddings": True}),
    "sliding windows, tied (gemma3)": ("gemma3_text", {"sliding_window": 64}),
    "fused projections (phi3)": ("phi3", {}),
    "parallel residual, biases (gpt-neox)": ("gpt_neox", {}),
    "learned positions, biases (gpt2)": ("gpt2", {}),
    "mixture of experts (qwen3-moe)": ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 4}),
    "latent attention, experts (deepseek-v3)": (
        "deepseek_v3",
        {"num_key_value_heads": 8, "n_routed_experts": 16, "first_k_dense_replace": 1},
    ),
    "convolutions between (lfm2)": ("lfm2", {"layer_types": ["conv", "full_attention"] * 3}),
}
LAYOUTS = [
    ("fsdp2", 2),
    ("hsdp", 4),
    ("fsdp2:tp=2", 2),
    ("fsdp2:tp=4", 4),
    ("fsdp2:dp_shard=2,tp=2", 4),
    ("fsdp2:cp=2", 2),
    ("fsdp2:cp=4", 4),
    ("fsdp2:cp=2,cp_attention=ring", 2),
    ("fsdp2:tp=2,cp=2", 4),
]
START, END = "<!-- table -->", "<!-- end of table -->"


def main() -> None:
    warnings.simplefilter("ignore")
    notes: dict[str, int] = {}
    lines = [
        "| model | " + " | ".join(f"`{layout}`" for layout, _ in LAYOUTS) + " |",
        "| --- " * (len(LAYOUTS) + 1) + "|",
    ]
    for name, (family, options) in MODELS.items():
        cells = [cell(family, dict(options), layout, devices, notes) for layout, devices in LAYOUTS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    lines += ["", *(f"{number}. {text}" for text, number in notes.items())]
    page = Path(__file__).with_name("verify.md")
    before, _, rest = page.read_text().partition(START)
    page.write_text(before + START + "\n" + "\n".join(lines).rstrip() + "\n" + END + rest.partition(END)[2])


def cell(family: str, options: dict[str, Any], layout: str, devices: int, notes: dict[str, int]) -> str:
    lora = options.pop("lora", None)
    with torch.device("meta"):
        config = tiny_config(family, **{**SIZES, **options})
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict()))
    module = CausalLMModule(model, tokenizer=tiny_tokenizer(), lora=lora)
    data = [[row] for seed in range(8) for row in rows_of("packed, ragged", seed)]  # 29 tokens, 4 documents
    try:
        report = verify(module, data, layout, devices, launch=Processes("fork"))
    except ValueError as error:
        return f"refused ({note(str(error), notes)})"
    except RuntimeError as error:
        return f"**fails** ({note(str(error).strip().splitlines()[-1], notes)})"
    worst = max(q.error for q in report.quantities)
    return f"{worst:.0e}" if report.passed else f"**{worst:.0e}** ({note('; '.join(report.findings), notes)})"


def note(text: str, notes: dict[str, int]) -> str:
    return str(notes.setdefault(text, len(notes) + 1))


if __name__ == "__main__":
    main()
