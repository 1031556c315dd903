"""The page that chooses: its memory is what was measured, its shapes are those of the models, its YAML is taken."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.processes import amt

SITE = Path(__file__).parents[2] / "docs" / "site"
sys.path.insert(0, str(SITE))

import choose  # noqa: E402
from memory import Shape, needed  # noqa: E402

ONE, EIGHT, MIXTURE = (
    choose.MODELS[name] for name in ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B")
)
QWEN, GEMMA, SINKS = (choose.MODELS[name] for name in ("Qwen/Qwen3-8B", "google/gemma-3-4b-it", "openai/gpt-oss-20b"))

# Peaks of benchmarks/RESULTS.md, in GiB a GPU: shape, goal, GPUs, tokens of a micro-batch, recomputed, accumulated.
MEASURED = [
    (EIGHT, "full", 2, 8192, False, False, 73.2),
    (EIGHT, "full", 2, 16384, False, False, 96.5),
    (EIGHT, "full", 2, 8192, True, False, 63.8),
    (EIGHT, "lora", 1, 8192, False, True, 44.8),
    (EIGHT, "lora", 1, 65536, True, True, 48.2),
    (EIGHT, "lora", 1, 131072, True, True, 80.9),
    (EIGHT, "full", 2, 131072, True, False, 113.6),
    (ONE, "full", 2, 16384, False, False, 22.3),
    (replace(ONE, tied=False), "full", 1, 8192, False, True, 32.73),
    (MIXTURE, "lora", 1, 8192, False, True, 102.5),
    (replace(MIXTURE, layers=6), "full", 1, 16384, False, False, 67.8),
    (EIGHT, "lora", 1, 8192, True, True, 21.1),
    (EIGHT, "lora", 1, 4096, False, True, 30.8),
    (EIGHT, "full", 1, 8192, True, True, 126.9),
    (EIGHT, "full", 8, 4096, True, True, 23.6),
    (EIGHT, "full", 8, 8192, False, True, 46.8),
    (EIGHT, "full", 8, 16384, False, True, 69.1),
    (QWEN, "lora", 1, 8192, True, True, 21.6),
    (QWEN, "lora", 1, 4096, False, True, 31.6),
    (QWEN, "lora", 1, 8192, False, True, 46.0),
    (QWEN, "full", 1, 4096, True, True, 127.6),
    (QWEN, "full", 8, 2048, True, True, 23.4),
    (QWEN, "full", 8, 4096, False, True, 35.3),
    (QWEN, "full", 8, 16384, False, True, 76.4),
    (GEMMA, "lora", 1, 4096, False, True, 20.9),
    (GEMMA, "lora", 1, 8192, False, True, 31.2),
    (GEMMA, "full", 1, 4096, False, True, 72.8),
    (GEMMA, "full", 1, 16384, False, True, 102.3),
    (GEMMA, "full", 8, 8192, False, True, 34.7),
    (GEMMA, "full", 8, 16384, False, True, 54.4),
    (SINKS, "qlora", 1, 8192, True, True, 18.6),
    (SINKS, "lora", 1, 2048, True, True, 43.7),
    (SINKS, "lora", 1, 8192, False, True, 67.6),
    (SINKS, "lora", 1, 16384, False, True, 90.3),
    (MIXTURE, "qlora", 1, 2048, False, True, 36.2),
    (MIXTURE, "lora", 1, 8192, True, True, 71.0),
    (MIXTURE, "lora", 1, 8192, False, True, 104.9),
]


@pytest.mark.parametrize(("shape", "goal", "gpus", "tokens", "recompute", "accumulate", "gib"), MEASURED)
def test_memory_is_what_was_measured(
    shape: Shape, goal: str, gpus: int, tokens: int, recompute: bool, accumulate: bool, gib: float
) -> None:
    parts = needed(shape, goal, gpus, tokens, recompute=recompute, accumulate=accumulate)
    assert sum(parts.values()) == pytest.approx(gib, rel=0.06)
    assert f"{gib:g}" in (SITE.parents[1] / "benchmarks" / "RESULTS.md").read_text()


# Part of a name -> its decoder, and the width of a head.
FAMILIES = {
    "llama": ("llama", 128),
    "A3B": ("qwen3_moe", 128),
    "Qwen3": ("qwen3", 128),
    "gemma-3": ("gemma3_text", 256),
    "gpt-oss": ("gpt_oss", 64),
}


@pytest.mark.parametrize("name", choose.MODELS)
def test_shapes_count_what_transformers_builds(name: str) -> None:
    shape = choose.MODELS[name]
    family, head = next(kind for words, kind in FAMILIES.items() if words in name)
    config = AutoConfig.for_model(
        family,
        hidden_size=shape.hidden,
        num_hidden_layers=2,
        head_dim=head,
        num_attention_heads=shape.queries // head,
        num_key_value_heads=shape.keys // head,
        intermediate_size=shape.feed_forward,
        moe_intermediate_size=shape.feed_forward,
        num_experts=shape.experts,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        attention_bias=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = (p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("bias"))
    counted = sum(parameter.numel() for parameter in matrices)
    assert counted == replace(shape, layers=2).parameters


def test_no_answer_asks_for_more_than_there_is() -> None:
    for question, plan in choose.answers().items():
        _, _, gpus, memory, length = question.split("|")
        if plan is not None:
            strategy, rows, gib = plan
            assert gib <= choose.USABLE * int(memory) + 0.05, question
            assert rows == 1 or rows * int(length) <= choose.MOST_TOKENS
            assert "cp=" not in strategy or int(gpus) > 1
    assert choose.plan("meta-llama/Llama-3.1-70B", "full", 1, 24, 2048) is None


@pytest.mark.parametrize("goal", choose.GOALS)
def test_the_yaml_is_a_configuration(goal: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(choose.yaml_of("meta-llama/Llama-3.1-8B", goal, 8, 80, 8192))
    printed = amt("fit", "--config", "run.yaml", "--print_config", folder=tmp_path)
    assert "model: meta-llama/Llama-3.1-8B" in printed
