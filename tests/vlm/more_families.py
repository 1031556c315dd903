"""More families for tests/vlm/families.py: a config and a processor of each."""

from __future__ import annotations

from typing import Any

import transformers

from tests.vlm.pieces import TEMPLATE, TEXT, VISION, byte_tokenizer, without_videos

SPECIAL = [
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<|video|>", "<boi>", "<eoi>",
    "<|vision_start|>", "<|vision_end|>", "<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>",
    "<IMG_ROW>", "<IMG_END>", "<fake>", "<end_of_utterance>", "<boa>", "<eoa>", "<audio>",
]  # fmt: skip
ID = {token: 256 + index for index, token in enumerate(SPECIAL)}
IMAGE = ID["<image>"]
MARKS = dict.fromkeys(
    ("qwen2_vl", "glm4v", "paddleocr_vl", "video_llama_3", "ernie4_5_vl_moe"), "<|vision_start|><image><|vision_end|>"
)
_GRID = {"image_token_id": IMAGE, "video_token_id": ID["<video>"]}
_ENDS = {"vision_start_token_id": ID["<|vision_start|>"], "vision_end_token_id": ID["<|vision_end|>"]}
_PIECES = {**TEXT, "head_dim": 8}


def _sections(*sizes: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sizes), **more}


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": _sections(1, 1, 2)},
        "vision_config": {"embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "depth": 2,
                          "patch_size": 14},
        **_GRID, **_ENDS,
    },
    "glm4v": {
        "text_config": {**TEXT, "rope_parameters": _sections(1, 1, 2)},
        "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "depth": 2, "patch_size": 14,
                          "out_hidden_size": 32, "image_size": 56},
        **_GRID, "image_start_token_id": ID["<|vision_start|>"], "image_end_token_id": ID["<|vision_end|>"],
        "video_start_token_id": ID["<boi>"], "video_end_token_id": ID["<eoi>"],
    },
    "paddleocr_vl": {
        "text_config": {**_PIECES, "rope_parameters": _sections(1, 1, 2)},
        "vision_config": {**VISION, "image_size": 56},
        **_GRID, **_ENDS,
    },
    "video_llama_3": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "patch_size": 14},
        **_GRID,
    },
    "llava_next": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        "image_token_index": IMAGE,
        "image_token_id": IMAGE,
    },
    "gemma4": {
        "text_config": {**_PIECES, "sliding_window": 64, "vocab_size_per_layer_input": 320,
                        "hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "num_key_value_heads": 2, "head_dim": 8, "patch_size": 14, "pooling_kernel_size": 3,
                          "position_embedding_size": 512},
        "image_token_id": IMAGE, "boi_token_id": ID["<boi>"], "eoi_token_id": ID["<eoi>"],
        "video_token_id": ID["<|video|>"], "boa_token_id": ID["<boa>"], "eoa_token_index": ID["<eoa>"],
        "audio_token_id": ID["<audio>"],
    },
    "deepseek_vl": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "image_token_id": IMAGE,
    },
    "ovis2": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "vocab_size": 64, "hidden_stride": 1},
        "image_token_id": ID["<IMG_ATOM>"],
        "visual_indicator_token_ids": [ID[f"<IMG_{name}>"] for name in ("START", "GRID", "COL", "ROW", "END")],
        "hidden_size": 32,
        "vocab_size": 320,
    },
    "idefics2": {
        "text_config": {**_PIECES, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**VISION, "image_size": 56},
        "perceiver_config": {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                             "resampler_head_dim": 8, "num_key_value_heads": 1, "hidden_size": 32},
        "image_token_id": IMAGE,
    },
    "ernie4_5_vl_moe": {
        "text_config": {**TEXT, "moe_intermediate_size": [16, 8], "moe_k": 2, "moe_num_experts": 4,
                        "moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"],
                        "rope_parameters": _sections(1, 1, 2)},
        "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "depth": 2, "patch_size": 14},
        **_GRID, "image_start_token_id": ID["<|vision_start|>"], "image_end_token_id": ID["<|vision_end|>"],
        "video_start_token_id": ID["<boi>"], "video_end_token_id": ID["<eoi>"],
    },
}  # fmt: skip
MORE = tuple(family for family in CONFIGS if family not in ("idefics2", "ernie4_5_vl_moe"))
"""Of which all works. The processor of idefics2 does not say what it writes for a picture. ernie4_5_vl_moe has experts
for tokens of pictures, and refuses context parallel."""


def tokenizer() -> Any:
    """Bytes and the special tokens of these families."""
    named = {"image_token": "<image>", "video_token": "<video>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    named |= {"image_boundary_token": "<fake>", "audio_token": "<audio>", "boa_token": "<boa>", "eoa_token": "<eoa>"}
    named |= {"image_start_token": "<|vision_start|>", "image_end_token": "<|vision_end|>"}
    named |= {"video_start_token": "<boi>", "video_end_token": "<eoi>"}
    return byte_tokenizer(ID, {**named, **{f"special_{index}": token for index, token in enumerate(SPECIAL[5:])}})


def processor_of(family: str) -> Any:
    """The family's own processor, with an empty part for videos."""
    made: dict[str, Any] = {
        "tokenizer": tokenizer(),
        "chat_template": TEMPLATE.replace("MARK", MARKS.get(family, "<image>")),
    }
    small = {"height": 28, "width": 28}
    pixels = {"shortest_edge": 28**2, "longest_edge": 8 * 28**2}
    if family == "qwen2_vl":
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        pictures: Any = Qwen2VLImageProcessorPil(patch_size=14, size=pixels)
        return without_videos(transformers.Qwen2VLProcessor, image_processor=pictures, **made)
    if family == "ernie4_5_vl_moe":
        from transformers.models.ernie4_5_vl_moe import image_processing_pil_ernie4_5_vl_moe as ernie

        pictures = ernie.Ernie4_5_VLMoeImageProcessorPil(patch_size=14, size=pixels)
        return without_videos(transformers.Ernie4_5_VLMoeProcessor, image_processor=pictures, **made)
    if family == "glm4v":
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

        size = {"shortest_edge": 2 * 28**2, "longest_edge": 16 * 28**2}
        pictures = Glm4vImageProcessorPil(patch_size=14, size=size)
        return without_videos(transformers.Glm4vProcessor, image_processor=pictures, **made)
    if family == "paddleocr_vl":
        from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

        return transformers.PaddleOCRVLProcessor(
            image_processor=PaddleOCRVLImageProcessorPil(patch_size=14, size=pixels), **made
        )
    if family == "video_llama_3":
        from transformers.models.video_llama_3 import image_processing_pil_video_llama_3 as video_llama_3

        pictures = video_llama_3.VideoLlama3ImageProcessorPil(patch_size=14, merge_size=1, size=pixels)
        return without_videos(transformers.VideoLlama3Processor, image_processor=pictures, **made)
    if family == "llava_next":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        pictures = LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size=small, image_grid_pinpoints=CONFIGS[family]["image_grid_pinpoints"]
        )
        more = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return transformers.LlavaNextProcessor(image_processor=pictures, **more, **made)
    if family == "gemma4":
        from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

        pictures = Gemma4ImageProcessorPil(patch_size=14, max_soft_tokens=70, pooling_kernel_size=3)
        parts = {"image_processor": pictures, "feature_extractor": None}
        return without_videos(transformers.Gemma4Processor, **parts, **made)
    if family == "deepseek_vl":
        from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

        pictures = DeepseekVLImageProcessorPil(size=small, min_size=14)
        return transformers.DeepseekVLProcessor(image_processor=pictures, num_image_tokens=4, **made)
    if family == "ovis2":
        from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

        pictures = Ovis2ImageProcessorPil(size=small, crop_to_patches=True, max_patches=4)
        return transformers.Ovis2Processor(image_processor=pictures, image_seq_length=4, **made)
    assert family == "idefics2"
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    pictures = Idefics2ImageProcessorPil(size={"shortest_edge": 28, "longest_edge": 56}, do_image_splitting=False)
    return transformers.Idefics2Processor(image_processor=pictures, image_seq_len=4, **made)
