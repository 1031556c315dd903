"""Models with several towers: a second encoder of pictures, one of videos, one of sound."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from automodel_trainer import LoRAConfig
from automodel_trainer.models.lora.targets import find_targets
from automodel_trainer.models.parts import ModelParts, freeze_parts
from automodel_trainer.nn.flops import flops_per_token
from automodel_trainer.nn.towers import towers_of
from tests.vlm.families import ALL
from tests.vlm.families import model_of as tiny

TOWERS = {
    "deepseek_vl_hybrid": ["model.vision_model", "model.high_res_vision_model"],
    "video_llava": ["model.image_tower", "model.video_tower"],
    "qwen2_5_omni_thinker": ["model.visual", "model.audio_tower"],
    "idefics": ["model.vision_model"],  # inside the decoder
    "blip-2": ["vision_model"],  # and a transformer between it and the language model, which is trained
}


@functools.cache
def configured(family: str) -> PreTrainedModel:
    """A model of transformers' default sizes without memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(family))


@pytest.mark.parametrize("family", TOWERS)
def test_every_tower_is_found(family: str) -> None:
    model = configured(family)
    names = {id(module): name for name, module in model.named_modules()}
    assert [names[id(tower)] for tower in towers_of(model)] == TOWERS[family]


@pytest.mark.parametrize("family", TOWERS)
def test_frozen_towers_are_frozen_all(family: str) -> None:
    """Also one that transformers has no name for; and it gets no adapters, and costs nothing for a token of text."""
    model = configured(family)
    parts = ModelParts(model)
    inside = [name for name, _ in model.named_parameters() if name.startswith(tuple(f"{t}." for t in TOWERS[family]))]
    assert {parts.of(name) for name in inside} == {"vision"}
    model.requires_grad_(True)  # idefics freezes its language model
    before = flops_per_token(model, 8)
    freeze_parts(model, ["vision"])
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == inside
    assert {parts.of(target.name) for target in find_targets(model, LoRAConfig())} == {"language"}
    assert flops_per_token(model, 8) == before


@pytest.mark.parametrize("family", ALL)
def test_others_have_one(family: str) -> None:
    assert len(towers_of(tiny(family))) == 1
