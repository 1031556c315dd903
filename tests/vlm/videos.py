"""The parts of transformers' processors for videos. Without torchvision, torch does what they ask of it."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import interpolate
from transformers.video_processing_utils import BaseVideoProcessor

CLASSES = {
    "qwen2_5_vl": "qwen2_vl.video_processing_qwen2_vl.Qwen2VLVideoProcessor",
    **dict.fromkeys(("qwen3_vl", "qwen3_5"), "qwen3_vl.video_processing_qwen3_vl.Qwen3VLVideoProcessor"),
    "llava_onevision": "llava_onevision.video_processing_llava_onevision.LlavaOnevisionVideoProcessor",
    "internvl": "internvl.video_processing_internvl.InternVLVideoProcessor",
}
"""Of each family whose videos stay videos."""
MODES = {2: "bilinear", 3: "bicubic"}


class ByTorch(BaseVideoProcessor):
    """What torchvision computes, in torch."""

    def resize(self, image: Any, size: Any, resample: Any = None, **_: Any) -> Any:
        made = interpolate(image.flatten(0, -4), (size.height, size.width), mode=MODES[int(resample)], antialias=True)
        return made.reshape(*image.shape[:-2], size.height, size.width)

    def convert_to_rgb(self, video: Any) -> Any:
        assert video.shape[-3] == 3
        return video

    def normalize(self, image: Any, mean: Any, std: Any, **_: Any) -> Any:
        return (image - torch.as_tensor(mean)[:, None, None]) / torch.as_tensor(std)[:, None, None]


def video_processor_of(family: str, **settings: Any) -> Any:
    """The family's own part for videos."""
    module, _, name = CLASSES[family].rpartition(".")
    if find_spec("torchvision") is not None:
        return getattr(import_module(f"transformers.models.{module}"), name)(**settings)
    kind = globals().get(name)
    if kind is None:
        paths = ["torchvision"] + [f"torchvision.{rest}" for rest in ("transforms", "transforms.v2")]
        names = [*paths, "torchvision.transforms.v2.functional"]
        with mock.patch.dict(sys.modules, {path: ModuleType(path) for path in names}):
            real = getattr(import_module(f"transformers.models.{module}"), name)
        kind = type(name, (real, ByTorch), {"__module__": __name__})
        globals()[name] = kind  # so that it can be pickled
    return kind(**settings)
