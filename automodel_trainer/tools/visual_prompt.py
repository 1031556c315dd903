"""What the first prompt of `amt generate` shows: pictures and videos, read as training reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from automodel_trainer.data.pictures.files import Pictures


class VisualPrompt:
    """Turns conversations into the inputs of a vision-language model.

    Args:
        processor: the model's processor, with a chat template.
        images: files of pictures that the first prompt shows.
        videos: files of videos, or folders of their frames (in the order of their names), that it shows after them. If
            the processor has no part for videos, frames of a folder are pictures.
        fps: frames per second of folders, and how many of a file are taken; None: what the processor says.
        max_pixels: as of the data that the model was trained on; None: no limit.

    Raises:
        ValueError: a file cannot be read, or the processor cannot show a video's file.
    """

    def __init__(
        self,
        processor: Any,
        images: Sequence[str | Path] = (),
        videos: Sequence[str | Path] = (),
        fps: float | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self.processor, self._max_pixels = processor, max_pixels
        here = self._in(Path.cwd(), Path("/"))  # a path or link of the user's may lead anywhere
        self.pictures = [here.read(os.path.expanduser(path)) for path in images]
        self.films: list[Any] = []
        self._encoder: Any = None
        if videos:
            self._read_videos([Path(path).expanduser() for path in videos], fps)

    def inputs(self, conversation: Sequence[dict[str, str]]) -> Any:
        """What the model reads of a conversation, up to where its answer begins: tensors `[1, …]`."""
        messages: list[dict[str, Any]] = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} for m in conversation
        ]
        first = next(message for message in messages if message["role"] == "user")
        shown = [{"type": "image", "image": picture} for picture in self.pictures]
        first["content"] = [*shown, *({"type": "video"} for _ in self.films), *first["content"]]
        if not self.films:
            return self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self._encoder.inputs([text], [[*self.pictures, *self.films]])

    def _read_videos(self, paths: Sequence[Path], fps: float | None) -> None:
        from automodel_trainer.data.pictures.encode import PictureEncoder
        from automodel_trainer.data.pictures.rows import GIVE_FRAMES, Clip
        from automodel_trainer.data.pictures.videos import Videos

        self._encoder = PictureEncoder(self.processor, "all")
        part = self._encoder.videos
        for path in paths:
            frames = _frames(path) if path.is_dir() else None
            if part is not None:
                reader = Videos(self._in(path if frames else path.parent), part, fps)
                self.films.append(reader.read(Clip(frames or path.name)))
            elif frames is None:
                why = self._encoder.video_obstacle
                raise ValueError(f"--video {path}: {why}. {GIVE_FRAMES} Here: --video FOLDER.")
            else:
                self.pictures += [self._in(path).read(frame) for frame in frames]

    def _in(self, folder: Path, *more: Path) -> Pictures:
        return Pictures(folder, max_pixels=self._max_pixels, more_roots=more)


def _frames(folder: Path) -> list[str]:
    """The names of a folder's files in the order of their numbers: 2 before 10."""
    found = [file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    if not found:
        raise ValueError(f"--video {folder} is an empty folder. Give a folder of frames (0001.png, …) or a file.")
    return sorted(found, key=_by_number)


def _by_number(name: str) -> list[str | int]:
    """The parts of a name, text and numbers in turn."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name))]
