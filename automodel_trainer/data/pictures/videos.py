"""Videos: lists of frames and files, what is known of them without decoding, and a processor's part for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from automodel_trainer.data.pictures.files import Pictures
from automodel_trainer.data.pictures.rows import Clip, frames_of, name_of

DECODERS = {"torchcodec": "torchcodec", "av": "pyav", "cv2": "opencv"}
"""Packages that decode videos, and what transformers calls them."""
_OF_CALL = ("input_data_format", "do_convert_rgb", "do_sample_frames", "device", "video_metadata")


class Footage(NamedTuple):
    """What is known of a video without its pixels.

    Attributes:
        size: width and height of its frames, as the processor will see them.
        taken: numbers of the frames that the model sees.
        total: how many frames it has.
        fps: frames per second of all its frames; None: nobody said.
    """

    size: tuple[int, int]
    taken: tuple[int, ...]
    total: int
    fps: float | None

    def blank(self) -> np.ndarray:
        """As many black frames of this size: uint8 `[frames, height, width, 3]`."""
        width, height = self.size
        return np.zeros((len(self.taken), height, width, 3), np.uint8)

    def metadata(self) -> dict[str, Any]:
        """What transformers' processors read of a video. They change it."""
        width, height = self.size
        duration = None if self.fps is None else self.total / self.fps
        return {
            "total_num_frames": self.total, "fps": self.fps, "duration": duration, "width": width, "height": height,
            "frames_indices": list(self.taken),
        }  # fmt: skip


@dataclass(frozen=True)
class Videos:
    """How the videos of a data set are read.

    Args:
        pictures: how pictures are read; frames are.
        part: the processor's part for videos, which says which frames of a file are taken.
        fps: frames per second of lists that do not say theirs, and how many of a file are taken; None: what the
            processor says.
    """

    pictures: Pictures
    part: VideoPart
    fps: float | None = None

    def look(self, clip: Clip) -> Footage:
        """What is known of a video, from headers.

        Raises:
            ValueError: it cannot be read, or its frames differ in size.
        """
        frames = frames_of(clip.source)
        if frames is None:
            return self._look_at_file(clip)
        sizes = [self.pictures.size(frame) for frame in frames]
        other = next((place for place, size in enumerate(sizes) if size != sizes[0]), None)
        if other is not None:
            raise ValueError(
                f"the frames of a video differ in size: {name_of(frames[0])!r} has {sizes[0][0]} × {sizes[0][1]} "
                f"pixels and {name_of(frames[other])!r} has {sizes[other][0]} × {sizes[other][1]}. Make them alike."
            )
        rate = clip.fps if clip.fps is not None else self.fps
        return Footage(sizes[0], tuple(range(len(frames))), len(frames), rate)

    def read(self, clip: Clip) -> tuple[np.ndarray, Footage]:
        """The frames that the model sees, uint8 `[frames, height, width, 3]`, and what is known of the video.

        Raises:
            ValueError: it cannot be read, or its frames differ in size.
        """
        footage = self.look(clip)
        frames = frames_of(clip.source)
        if frames is not None:
            return np.stack([np.asarray(self.pictures.read(frame)) for frame in frames]), footage
        decoded = _decoded(self.pictures.path(_path(clip.source), "video"), footage.taken)
        if decoded.shape[2:0:-1] != footage.size:
            decoded = np.stack([np.asarray(_resized(frame, footage.size)) for frame in decoded])
        return decoded, footage

    def _look_at_file(self, clip: Clip) -> Footage:
        path = self.pictures.path(_path(clip.source), "video")
        found = _header(path)
        total, fps = int(found.total_num_frames or 0), float(found.fps or 0)
        if not (total and fps and found.width and found.height):
            raise ValueError(
                f"video {name_of(clip.source)!r} does not say how many frames it has, how fast and how large they are. "
                "Write it anew (`ffmpeg -i FILE NEW.mp4`), or give the list of its frames."
            )
        wanted = clip.fps if clip.fps is not None else self.fps
        try:
            taken = self.part.taken(found, wanted)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"no frames of video {name_of(clip.source)!r} ({total} frames, {fps:g} a second) can be taken: {error}"
            ) from error
        return Footage(self.pictures.scaled(int(found.width), int(found.height)), taken, total, fps)


class VideoPart:
    """The part of a processor for videos.

    Args:
        processor: a processor that has one; see `obstacle`.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.token: str = processor.video_token

    @cached_property
    def own_tensors(self) -> bool:
        """Whether videos reach the model beside pictures, in tensors of their own, and not among them."""
        return bool(self._trial(2).keys() & set(self.processor.video_processor.model_input_names))

    @cached_property
    def same_length(self) -> bool:
        """Whether the videos of a micro-batch must have the same number of frames: they are stacked."""
        try:
            self._trial(2, 4)
        except (ValueError, RuntimeError, TypeError):
            return True
        return False

    @cached_property
    def reads_times(self) -> bool:
        """Whether the processor looks at the frames per second."""
        slow, fast = self._trial(4, fps=1.0), self._trial(4, fps=8.0)
        return any(not np.array_equal(np.asarray(slow[key]), np.asarray(fast[key])) for key in slow)

    def options(self, footage: Sequence[Footage]) -> dict[str, Any]:
        """Options of a call of the processor with videos whose frames were taken already."""
        return {"video_metadata": [item.metadata() for item in footage], "do_sample_frames": False}

    def taken(self, metadata: Any, fps: float | None) -> tuple[int, ...]:
        """The frames of a file that the processor takes.

        Args:
            metadata: transformers' `VideoMetadata`.
            fps: how many a second; None: as the processor's settings say.
        """
        own = self.processor.video_processor
        if fps is None and not getattr(own, "do_sample_frames", False):
            return tuple(range(int(metadata.total_num_frames)))
        names = [name for name in own.valid_kwargs.__annotations__ if name not in _OF_CALL]
        settings = {name: getattr(own, name, None) for name in names}
        if fps is not None:
            settings |= {"fps": min(fps, metadata.fps), "num_frames": None}
        return tuple(int(index) for index in own.sample_frames(metadata=metadata, **settings))

    def settings(self) -> dict[str, Any]:
        """Everything that decides what the processor makes of a video."""
        found: dict[str, Any] = self.processor.video_processor.to_dict()
        return found

    def _trial(self, *lengths: int, fps: float = 1.0) -> Mapping[str, Any]:
        """What the processor makes of small black videos with so many frames."""
        footage = [Footage((64, 64), tuple(range(length)), length, fps) for length in lengths]
        made: Mapping[str, Any] = self.processor(
            text=[self.token * len(lengths)],
            videos=[item.blank() for item in footage],
            return_tensors="pt",
            **self.options(footage),
        )
        return made


def obstacle(processor: Any) -> str | None:
    """Why a processor cannot show videos as videos; None: it can.

    Args:
        processor: a model's processor.
    """
    name, part = type(processor).__name__, getattr(processor, "video_processor", None)
    if not callable(part):
        return f"{name} has no part for videos"
    if not isinstance(getattr(processor, "video_token", None), str):
        return f"{name} does not say which token stands for a video (video_token)"
    shared = set(part.model_input_names) & set(processor.image_processor.model_input_names)
    if shared:  # a call with both would lose the pictures
        return f"{name} gives videos in the tensors of pictures ({', '.join(sorted(shared))})"
    return None


def _path(source: Any) -> str:
    """The path of a video.

    Raises:
        ValueError: it is given as something else.
    """
    path = source.get("path") if isinstance(source, dict) and source.get("bytes") is None else source
    if isinstance(path, str) and path:
        return path
    raise ValueError(
        f"a video is given as {name_of(source)[:80]!r}. Allowed: the list of its frames, or the path of a file."
    )


class _HeaderRead(Exception):
    """A decoder is stopped before it decodes."""


def _header(path: str) -> Any:
    """What the header of a file says: transformers' `VideoMetadata`."""
    found: list[Any] = []

    def stop(metadata: Any, **_: Any) -> Any:
        found.append(metadata)
        raise _HeaderRead

    with suppress(_HeaderRead):
        _load(path, stop)
    return found[0]


def _decoded(path: str, taken: Sequence[int]) -> np.ndarray:
    """These frames of a file: uint8 `[frames, height, width, 3]`."""
    frames = np.asarray(_load(path, lambda metadata, **_: list(taken)))
    frames = frames if frames.shape[-1] == 3 else frames.transpose(0, 2, 3, 1)
    if len(frames) != len(taken):
        raise ValueError(f"video {path!r} has fewer frames than its header says. It may be truncated.")
    return frames


def _load(path: str, choose: Any) -> Any:
    """Frames of a file, by the first decoder that is installed.

    Raises:
        ValueError: none is, or the file cannot be decoded.
    """
    from transformers import video_utils

    load_video: Any = video_utils.load_video

    backend = next((name for package, name in DECODERS.items() if find_spec(package) is not None), None)
    if backend is None:
        raise ValueError(
            f"video {path!r} is a file, and no package that decodes videos is installed. Install one of "
            f"{', '.join(DECODERS)} (PyPI: torchcodec, av, opencv-python-headless), or give the list of its frames."
        )
    try:
        return load_video(path, backend=backend, sample_indices_fn=choose)[0]
    except _HeaderRead:
        raise
    except Exception as error:  # of any decoder
        raise ValueError(f"video {path!r} cannot be decoded by {backend}: {error}") from error


def _resized(frame: np.ndarray, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)
