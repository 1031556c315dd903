"""Rows with videos, as lists of frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.vlm.families import picture

FRAMES = (4, 4, 4, 2, 3, 2)


def films(parent: Path, same: bool) -> list[dict[str, Any]]:
    """Conversations with a video, a video and a picture, a picture, two videos or none; frames lie in `parent`."""

    def video(number: int, index: int) -> dict[str, Any]:
        names = [f"{number}-{index}-{frame}.png" for frame in range(2 if same else FRAMES[(number + index) % 6])]
        for frame, name in enumerate(names):
            picture(30 + 30 * index, 60, seed=10 * number + frame).save(parent / name)
        return {"type": "video", "video": names, "fps": 2}

    picture(44, 60).save(parent / "still.png")
    made = []
    for number in range(5):
        still = [{"type": "image", "image": "still.png"}]
        parts = ([video(number, 0)], [*still, video(number, 0)], still, [video(number, 0), video(number, 1)], [])[
            number
        ]
        made.append({"messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": f"what? {number}"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a cat " * (number + 1)}]},
        ]})  # fmt: skip
    return made
