"""Tiny vision-language models of many families, with real processors, made in memory and never downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from tests.routers import separated
from tests.vlm import more_families
from tests.vlm.pieces import TEMPLATE, TEXT, VISION, byte_tokenizer, without_videos
from tests.vlm.videos import video_processor_of

SPECIAL = [
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "<|image_pad|>", "<|video_pad|>",
    "<|vision_start|>", "<|vision_end|>", "<start_of_image>", "<end_of_image>", "<image_soft_token>",
    "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<IMG_CONTEXT>", "<img>", "</img>", "<|image|>",
    "<video>", *(f"<row_{row}_col_{col}>" for row in (1, 2, 3, 4) for col in (1, 2, 3, 4)),
]  # fmt: skip
ID = {token: 256 + index for index, token in enumerate(SPECIAL)}
MARKS = {"qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>", "gemma3": "<start_of_image>"}
MARKS |= dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), MARKS["qwen2_5_vl"])
MARKS |= {"mllama": "<|image|>", "internvl": "<IMG_CONTEXT>"}
QWEN = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
}
ALONE = ("gemma3", "llava", "idefics3", "mllama")
"""Families whose processors have no part for videos, and so need no torchvision."""
FILMS = {"llava_onevision": "<video>", "internvl": "<video>"}
FILMS |= dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_5"), "<|vision_start|><|video_pad|><|vision_end|>")
"""Marks for videos, of families whose processors have a part for them that works beside pictures."""
ALL = (*ALONE, "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava_onevision", "smolvlm", "internvl")


def config_of(family: str) -> PreTrainedConfig:
    """A tiny config."""
    if family in more_families.CONFIGS:
        return AutoConfig.for_model(family, **more_families.CONFIGS[family])
    return AutoConfig.for_model(family, **_CONFIGS[family]())


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **more}


def _linear() -> dict[str, Any]:
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    return {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, **heads}  # fmt: skip


def _idefics(name: str) -> dict[str, Any]:
    text, vision = {**TEXT, "model_type": "llama"}, {**VISION, "image_size": 56}
    return {"text_config": text, "vision_config": vision, "scale_factor": 2, "image_token_id": ID["<image>"],
            "pad_token_id": 256}  # fmt: skip


def _with_experts(family: str, **more: Any) -> dict[str, Any]:
    config = _CONFIGS[family]()
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, **more}
    return {**config, "text_config": {**config["text_config"], **experts}}


_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
_CONFIGS: dict[str, Any] = {
    "qwen2_5_vl": lambda: {
        "text_config": {**TEXT, "rope_parameters": _rope(mrope_section=[1, 1, 2])},
        "vision_config": {**_TOWER, "depth": 2, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
        **QWEN,
    },
    "qwen3_vl": lambda: {
        "text_config": {
            **TEXT, "head_dim": 8, "rope_parameters": _rope(mrope_section=[1, 1, 2], mrope_interleaved=True)
        },
        "vision_config": {**_TOWER, "depth": 3, "patch_size": 16, "deepstack_visual_indexes": [0, 1],
                          "num_position_embeddings": 16},
        **QWEN,
    },
    "qwen3_vl_moe": lambda: _with_experts("qwen3_vl", tie_word_embeddings=False),
    "qwen3_5_moe": lambda: _with_experts("qwen3_5", shared_expert_intermediate_size=16),
    "qwen3_5": lambda: {
        "text_config": {**TEXT, "head_dim": 16, **_linear(), "rope_parameters": _rope(
            mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5)},
        "vision_config": {**_TOWER, "depth": 2, "patch_size": 16, "num_position_embeddings": 16},
        **QWEN,
    },
    "gemma3": lambda: {
        "text_config": {**TEXT, "head_dim": 8, "sliding_window": 64},
        "vision_config": {**VISION, "model_type": "siglip_vision_model", "image_size": 56, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_id": ID["<image_soft_token>"],
        "image_token_index": ID["<image_soft_token>"],
        "boi_token_index": ID["<start_of_image>"],
        "eoi_token_index": ID["<end_of_image>"],
    },
    "llava": lambda: {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
        "image_token_id": ID["<image>"],
        "image_token_index": ID["<image>"],
    },
    "llava_onevision": lambda: {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        "image_token_id": ID["<image>"],
        "image_token_index": ID["<image>"],
        "video_token_index": ID["<video>"],
        "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]],
    },
    "idefics3": lambda: _idefics("idefics3"),
    "smolvlm": lambda: _idefics("smolvlm"),
    "internvl": lambda: {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        "image_token_id": ID["<IMG_CONTEXT>"],
        "downsample_ratio": 0.5,
        "image_seq_length": 4,
    },
    "mllama": lambda: {
        "text_config": {**TEXT, "cross_attention_layers": [1], "num_hidden_layers": 3},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 48, "max_num_tiles": 4,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        "image_token_index": ID["<|image|>"],
    },
}  # fmt: skip


def tokenizer_of(family: str) -> Any:
    """Bytes and the special tokens of all families."""
    images = {"gemma3": "<image_soft_token>", "internvl": "<IMG_CONTEXT>", "mllama": "<|image|>"}
    named = {
        "image_token": "<|image_pad|>" if family.startswith("qwen") else images.get(family, "<image>"),
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "video_token": "<|video_pad|>" if family.startswith("qwen") else "<video>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    return byte_tokenizer(ID, named)


def processor_of(family: str, films: bool = False) -> Any:
    """The family's own processor. Its part for videos is an empty one; with `films` it is the real one."""
    if family in more_families.CONFIGS:
        return more_families.processor_of(family)
    tokenizer, config = tokenizer_of(family), config_of(family)
    template = TEMPLATE.replace("MARK", MARKS.get(family, "<image>"))
    made = {"tokenizer": tokenizer, "chat_template": template}
    if films:
        template = template.replace(
            "{% else %}{{ part", f"{{% elif part['type'] == 'video' %}}{FILMS[family]}{{% else %}}{{{{ part"
        )
        made |= {"chat_template": template, "video_processor": video_processor_of(family, **_films(family))}
    small = {"height": 28, "width": 28}
    if family.startswith("qwen"):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        patch = config.vision_config.patch_size
        size = {"shortest_edge": 4 * (patch * 2) ** 2, "longest_edge": 64 * (patch * 2) ** 2}
        pictures: Any = Qwen2VLImageProcessorPil(patch_size=patch, size=size)
        kind = transformers.Qwen2_5_VLProcessor if family == "qwen2_5_vl" else transformers.Qwen3VLProcessor
        return without_videos(kind, image_processor=pictures, **made)
    if family == "gemma3":
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        pictures = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
        return transformers.Gemma3Processor(image_processor=pictures, image_seq_length=4, **made)
    if family == "llava":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=small)
        more = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "patch_size": 14}
        return transformers.LlavaProcessor(image_processor=pictures, **more, **made)
    if family == "llava_onevision":
        from transformers.models.llava_onevision import image_processing_pil_llava_onevision as llava_onevision

        pictures = llava_onevision.LlavaOnevisionImageProcessorPil(
            size=small, image_grid_pinpoints=config.image_grid_pinpoints
        )
        more = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
        return without_videos(transformers.LlavaOnevisionProcessor, image_processor=pictures, **more, **made)
    if family in ("idefics3", "smolvlm"):
        sizes = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
        if family == "idefics3":
            from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

            return transformers.Idefics3Processor(
                image_processor=Idefics3ImageProcessorPil(**sizes), image_seq_len=4, **made
            )
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        pictures = SmolVLMImageProcessorPil(**sizes)
        return without_videos(transformers.SmolVLMProcessor, image_processor=pictures, image_seq_len=4, **made)
    if family == "internvl":
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        pictures = GotOcr2ImageProcessorPil(size=small, crop_to_patches=True, max_patches=4)
        return without_videos(transformers.InternVLProcessor, image_processor=pictures, image_seq_length=4, **made)
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    pictures = MllamaImageProcessorPil(size=small, max_image_tiles=4)
    return transformers.MllamaProcessor(image_processor=pictures, **made)


def _films(family: str) -> dict[str, Any]:
    """Settings of a tiny part for videos."""
    if not family.startswith("qwen"):
        return {"size": {"height": 28, "width": 28}}
    patch = config_of(family).vision_config.patch_size
    size = {"shortest_edge": 4 * (patch * 2) ** 2, "longest_edge": 64 * (patch * 2) ** 2}
    return {"patch_size": patch, "size": size, "cap_pixels_per_frame": False}


def model_of(family: str, seed: int = 3, layers: int = 2) -> PreTrainedModel:
    """A model with random weights in fp32, and so many layers of its language model."""
    config = config_of(family)
    if layers != config.text_config.num_hidden_layers:
        config.text_config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # a gate that starts at zero would hide what is behind it
                if parameter.unique().numel() == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        return separated(model) if getattr(config.text_config, "num_experts", 0) else model


def folder_of(family: str, parent: Path) -> Path:
    """The model's folder, with its processor if it needs no torchvision."""
    folder = parent / family
    if not folder.is_dir():
        model_of(family).save_pretrained(folder)
        if family in ALONE:
            processor_of(family).save_pretrained(folder)
    return folder


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng([seed, height, width]).integers(0, 255, (height, width, 3), np.uint8))


def rows(parent: Path, count: int = 8) -> list[dict[str, Any]]:
    """Conversations with one picture, two pictures, a video of two frames or none, whose files lie in `parent`."""
    made = []
    for index in range(count):
        answer = "a cat " * (index % 3 + 1)
        parts: list[dict[str, Any]] = []
        for number in range((1, 2, 0, 1)[index % 4]):
            name = f"{index}-{number}.png"
            picture(30 + 26 * (index % 3), 50 + 20 * number, seed=index).save(parent / name)
            parts.append({"type": "image", "image": name})
        if index % 8 == 5:
            parts = [{"type": "video", "video": [part["image"] for part in parts]}]
        parts.append({"type": "text", "text": f"what is it? {index}"})
        made.append({"messages": [{"role": "user", "content": parts},
                                  {"role": "assistant", "content": [{"type": "text", "text": answer}]}]})  # fmt: skip
    return made
