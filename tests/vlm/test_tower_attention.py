"""Pictures of a batch are attended to in one call, each by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from automodel_trainer.models.kernels import tower_attention
from automodel_trainer.models.kernels.tower_attention import NAME, install_tower_attention
from automodel_trainer.models.record import CompiledBlock, recorded
from automodel_trainer.strategies.base.compile import compile_blocks
from tests.harness import close
from tests.vlm.families import model_of, processor_of


def one_call(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, _: Tensor, longest: int, *__: int, scale: float
) -> Tensor:
    """What torch's kernel computes from `[tokens, heads, size]`: here with a mask of all tokens."""
    assert longest == int(starts.diff().max())
    pictures = torch.bucketize(torch.arange(len(query)), starts, right=True)
    mask = pictures[:, None] == pictures[None, :]
    flat = (tensor.transpose(0, 1) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*flat, mask, scale=scale).transpose(0, 1)


def pretend_to_have_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower_attention, "_DEVICE", "cpu")
    monkeypatch.setattr(tower_attention, "_DTYPES", (torch.float32,))
    monkeypatch.setattr(tower_attention, "_varlen", lambda: one_call)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize("long", [1024, 1], ids=["one call", "piece by piece"])
def test_features_are_those_of_transformers(family: str, long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family)
    pictures = [Image.effect_noise(size, 60).convert("RGB") for size in ((64, 96), (128, 64))]
    made = processor_of(family).image_processor(pictures, return_tensors="pt")
    wanted = model.get_image_features(**made)
    pretend_to_have_the_kernel(monkeypatch)
    monkeypatch.setattr(tower_attention, "_LONG", long)
    text = model.config.text_config._attn_implementation
    assert install_tower_attention(model, torch.device("cpu"))
    assert model.config.vision_config._attn_implementation == NAME
    assert model.config.text_config._attn_implementation == text
    for name, feature in enumerate(model.get_image_features(**made).pooler_output):
        close(feature, wanted.pooler_output[name])


def test_the_device_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by every layer. Boundaries that were changed in place are read again."""
    reads: list[list[int]] = []
    read = tower_attention._read
    monkeypatch.setattr(tower_attention, "_read", lambda bounds: reads.append(read(bounds)) or reads[-1])
    pretend_to_have_the_kernel(monkeypatch)
    monkeypatch.setattr(tower_attention, "_LONG", 1)
    model = model_of("qwen3_vl")
    assert install_tower_attention(model, torch.device("cpu"))
    assert len(model.model.visual.blocks) > 1
    processor = processor_of("qwen3_vl").image_processor
    for size in ((64, 96), (128, 64)):
        model.get_image_features(**processor([Image.effect_noise(size, 60).convert("RGB")], return_tensors="pt"))
    assert len(reads) == 2
    bounds = torch.tensor([0, 2, 6])
    assert tower_attention._lengths(bounds) == [2, 4]
    bounds[1] = 3
    assert tower_attention._lengths(bounds) == [3, 3]
    with torch.inference_mode():
        assert tower_attention._lengths(torch.tensor([0, 5])) == [5]


def test_other_towers_keep_their_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_to_have_the_kernel(monkeypatch)
    assert not install_tower_attention(model_of("llava"), torch.device("cpu"))


def test_blocks_are_compiled_once_for_all_numbers_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    pretend_to_have_the_kernel(monkeypatch)
    model = model_of("qwen2_5_vl")
    plain, processor = copy.deepcopy(model), processor_of("qwen2_5_vl").image_processor
    assert install_tower_attention(model, torch.device("cpu"))
    compile_blocks(model, backend=count, blocks=list(model.model.visual.blocks))
    made = []
    for sizes in ([(64, 96)], [(128, 64), (64, 64)], [(96, 96), (64, 160), (64, 64)]):
        pixels = processor([Image.effect_noise(size, 60).convert("RGB") for size in sizes], return_tensors="pt")
        for feature, wanted in zip(*(m.train().get_image_features(**pixels).pooler_output for m in (model, plain))):
            close(feature, wanted)
        made.append(len(graphs))
    assert made[0] > 0
    assert made == [made[0]] * 3


def test_blocks_that_cut_their_input_are_not_compiled() -> None:
    model = model_of("qwen2_5_vl")
    compile_blocks(model, backend="eager")
    compiled = {name for name, block in model.named_modules() if recorded(block, CompiledBlock)}
    assert compiled == {f"model.language_model.layers.{layer}" for layer in range(2)}
