"""Write the tables of docs/verify.md and docs/vlm.md: the result of `amt verify` for tiny models on many layouts.

python docs/verify_matrix.py            # a quarter of an hour on two cores
python docs/verify_matrix.py vlm        # the table of docs/vlm.md alone
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests.tiny

from automodel_trainer import CausalLMModule, ImageTextDataModule, ImageTextModule
from automodel_trainer.models.lora import LoRAConfig
from automodel_trainer.verification.ranks import Processes
from automodel_trainer.verification.verify import verify
from tests.strategies.test_context import rows_of
from tests.tiny import tiny_config, tiny_tokenizer
from tests.vlm.families import ALL, model_of, processor_of, rows
from tests.vlm.more_families import MORE

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
    ("fsdp2:ep=2", 2),
]
PICTURED = (*ALL, *MORE, "qwen3_vl_moe", "qwen3_5_moe")
LAYOUTS_OF_PICTURED = [("fsdp2", 2), ("fsdp2:tp=2", 2), ("fsdp2:cp=2", 2), ("3d:pp=2", 2), ("fsdp2:ep=2", 2)]
Layouts = Sequence[tuple[str, int]]
START, END = "<!-- table -->", "<!-- end of table -->"


def main() -> None:
    warnings.simplefilter("ignore")
    if sys.argv[1:] != ["vlm"]:
        write("verify.md", {name: text_of(*of) for name, of in MODELS.items()}, LAYOUTS)
    with tempfile.TemporaryDirectory() as folder:
        made = [row for index, row in enumerate(rows(Path(folder))) if index % 4 != 2]  # all of them with pictures
        path = Path(folder) / "pictures.jsonl"
        path.write_text("\n".join(map(json.dumps, made)))
        write("vlm.md", {f"`{family}`": pictures_of(family, path) for family in PICTURED}, LAYOUTS_OF_PICTURED)


def write(page: str, models: dict[str, Callable[[], tuple[Any, Any]]], layouts: Layouts) -> None:
    """The table of a page: a row for each model, with what makes its module and its data."""
    notes: dict[str, int] = {}
    lines = [
        "| model | " + " | ".join(f"`{layout}`" for layout, _ in layouts) + " |",
        "| --- " * (len(layouts) + 1) + "|",
    ]
    for name, made in models.items():
        cells = [cell(*made(), layout, devices, notes) for layout, devices in layouts]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    lines += ["", *(f"{number}. {text}" for text, number in notes.items())]
    path = Path(__file__).with_name(page)
    before, _, rest = path.read_text().partition(START)
    path.write_text(before + START + "\n" + "\n".join(lines).rstrip() + "\n" + END + rest.partition(END)[2])


def text_of(family: str, options: dict[str, Any]) -> Callable[[], tuple[Any, Any]]:
    """A model of text, and rows of 29 tokens with 4 documents."""

    def made() -> tuple[Any, Any]:
        sizes = {**SIZES, **options}
        lora = sizes.pop("lora", None)
        with torch.device("meta"):
            config = tiny_config(family, **sizes)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict()))
        data = [[row] for seed in range(8) for row in rows_of("packed, ragged", seed)]
        return CausalLMModule(model, tokenizer=tiny_tokenizer(), lora=lora), data

    return made


def pictures_of(family: str, path: Path) -> Callable[[], tuple[Any, Any]]:
    """A vision-language model, and rows with pictures."""

    def made() -> tuple[Any, Any]:
        module = ImageTextModule(model_of(family), processor=processor_of(family))
        return module, ImageTextDataModule(str(path), seq_len=256, cache=False)

    return made


def cell(module: Any, data: Any, layout: str, devices: int, notes: dict[str, int]) -> str:
    if "ep=" in layout and not getattr(module.given_model, "ep_plan", None):
        return "–"  # it has no experts
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
