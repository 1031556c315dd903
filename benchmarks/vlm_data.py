"""Shapes, processors and rows of `vlm.py`: pictures and videos are noise with rectangles, drawn once as JPEG files."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests

WARM_UP = 3  # steps before the clock starts
VISION = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "depth": 32, "out_hidden_size": 3584}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {  # 7B
        "text_config": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
        "vision_config": {**VISION, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
        "mrope_section": [16, 24, 24],
    },
    "qwen3_vl": {  # 8B
        "text_config": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
                        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936},
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "depth": 27,
                          "out_hidden_size": 4096, "patch_size": 16, "deepstack_visual_indexes": [8, 16, 24]},
        "mrope_section": [24, 20, 20],
    },
}  # fmt: skip
FRAMES, SIDE = 16, 448  # of a video


def config_of(args: argparse.Namespace) -> Any:
    from transformers import AutoConfig

    from tests.vlm.families import QWEN, TEXT
    from tests.vlm.families import config_of as tiny

    if args.tiny:
        return tiny(args.family)
    shape = SHAPES[args.family]
    ids = {key: TEXT[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": shape["mrope_section"]}
    text = {**shape["text_config"], **ids, "rope_parameters": rope, "max_position_embeddings": 32768}
    return AutoConfig.for_model(args.family, text_config=text, vision_config=shape["vision_config"], **QWEN)


def processor_of(args: argparse.Namespace, films: bool) -> Any:
    """A processor with the model's patches, that leaves pictures as large as they are."""
    from tests.vlm.families import processor_of as tiny
    from tests.vlm.videos import video_processor_of

    processor = tiny(args.family, films=films)
    if not args.tiny:
        patch = SHAPES[args.family]["vision_config"]["patch_size"]
        try:
            from transformers import Qwen2VLImageProcessor as Pictures
        except ImportError:
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Pictures
        size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 4096**2}
        sizes: dict[str, Any] = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "size": size}
        processor.image_processor = Pictures(**sizes)
        if films:
            processor.video_processor = video_processor_of(args.family, **sizes)
    return processor


def model_of(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(device()):
        return AutoModelForImageTextToText.from_config(config_of(args), dtype=torch.bfloat16)


def write_data(folder: Path, args: argparse.Namespace) -> Path:
    """Rows with one picture or video each and an answer; or rows of text with as many tokens as with a picture."""
    draw, shown = random.Random(0), "text" if args.case == "text" else "videos" if args.case == "videos" else "pictures"
    file = folder / f"{shown}.jsonl"
    patch = config_of(args).vision_config.patch_size
    pictures, side = min(64, FRAMES * args.samples if shown == "videos" else args.samples), args.pixels
    if shown == "videos":
        side = min(SIDE, args.pixels)
    for index in range(pictures if shown != "text" else 0):
        write_picture(folder / f"{index}.jpg", side, draw)
    with file.open("w") as out:
        for index in range(args.samples):
            answer = "".join(draw.choice("abcdefghij klmnop ") for _ in range(args.answer))
            question = "q" * (args.pixels // (2 * patch)) ** 2 if shown == "text" else "What is shown here?"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            row: dict[str, Any] = {"messages": turns}
            if shown == "pictures":
                row["image"] = f"{index % 64}.jpg"
            elif shown == "videos":
                row["video"] = [f"{(index * FRAMES + frame) % pictures}.jpg" for frame in range(FRAMES)]
            out.write(json.dumps(row) + "\n")
    return file


def write_picture(file: Path, side: int, draw: random.Random) -> None:
    """Noise with rectangles, as JPEG."""
    from PIL import Image, ImageDraw

    image = Image.effect_noise((side, side), 80).convert("RGB")
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        corner = [draw.randrange(side // 2) for _ in range(2)]
        pen.rectangle([*corner, corner[0] + 90, corner[1] + 60], fill=tuple(draw.choices(range(256), k=3)))
    image.save(file, quality=90)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def peak() -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0.0


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
