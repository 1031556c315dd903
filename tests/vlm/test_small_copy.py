"""A small copy of a vision-language model has a shallow tower, so it can be made of models as large as people train."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from automodel_trainer.models.shrink import shrink
from automodel_trainer.models.small_copy import small_copy
from tests.vlm.families import config_of

AUTO = "AutoModelForImageTextToText"


def wide(family: str, **vision: Any) -> Any:
    """A config with the sizes of a model of billions of parameters."""
    text = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return AutoConfig.for_model(family, text_config=text, vision_config={"out_hidden_size": 3584, **vision})


@pytest.mark.parametrize(
    ("family", "named", "depth"),
    [("qwen2_5_vl", "fullatt_block_indexes", 5), ("qwen3_vl", "deepstack_visual_indexes", 4)],
)
def test_a_tower_becomes_shallow(family: str, named: str, depth: int) -> None:
    config = wide(family)
    small = shrink(config, 4, 24, 96)
    assert small.vision_config.depth == depth
    assert len(getattr(small.vision_config, named)) == len(getattr(config.vision_config, named)) == depth - 1
    assert small.vision_config.out_hidden_size == small.text_config.hidden_size < 3584
    assert sum(small.text_config.rope_parameters["mrope_section"]) == 8
    assert config.vision_config.out_hidden_size == 3584  # unchanged


def test_positions_that_turn_half_of_a_head() -> None:
    config = AutoConfig.for_model("glm4v")
    config.text_config.rope_parameters |= {"partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
    assert shrink(config, 4, 24, 96).text_config.rope_parameters["mrope_section"] == [1, 1, 2]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "internvl"])
def test_the_copy_runs(family: str) -> None:
    config = config_of(family)
    name = "depth" if hasattr(config.vision_config, "depth") else "num_hidden_layers"
    setattr(config.vision_config, name, 32)
    copy = small_copy(config, AUTO)
    assert getattr(copy.config.vision_config, name) <= 5


LLAMA4 = {
    "text_config": {"num_hidden_layers": 4, "num_local_experts": 4, "intermediate_size_mlp": 64},
    "vision_config": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 56,
                      "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama4", LLAMA4),  # its tower has a buffer of complex numbers
        ("mistral4", {}),  # latent attention whose heads are as wide as both parts of a query
        ("molmo2", {"vision_config": {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16}}),  # token types
        ("ovis2", None),  # says the decoder's sizes twice
        ("qwen2_vl", None),  # a tower whose hidden size is the decoder's
    ],
)
def test_the_copy_of_others_runs(family: str, sizes: dict[str, Any] | None) -> None:
    small_copy(config_of(family) if sizes is None else AutoConfig.for_model(family, **sizes), AUTO)


def test_sizes_that_a_config_says_twice_stay_the_same() -> None:
    config = config_of("ovis2")
    small = shrink(config, 4, 24, 96)
    assert small.vocab_size == small.text_config.vocab_size < config.vocab_size
    assert small.hidden_size == small.text_config.hidden_size != config.hidden_size
    config = config_of("qwen2_vl")
    assert shrink(config, 4, 24, 96).vision_config.hidden_size != config.vision_config.hidden_size
