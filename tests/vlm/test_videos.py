"""Videos by a processor's own part for them, against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from automodel_trainer import ImageTextDataModule, ImageTextModule
from automodel_trainer.connect import connect
from automodel_trainer.data.pictures import videos
from automodel_trainer.models._masks import packing_without_sync
from automodel_trainer.tools.generate import generate
from automodel_trainer.tools.visual_prompt import VisualPrompt
from tests.vlm.documents import check_documents
from tests.vlm.families import FILMS, folder_of, model_of, picture, processor_of
from tests.vlm.films import films


def by_transformers(processor: Any, row: dict[str, Any], root: Path) -> Any:
    """What plain transformers makes of a row."""
    parts = row["messages"][0]["content"]
    text = processor.apply_chat_template(row["messages"], tokenize=False)
    stills = [Image.open(root / part["image"]) for part in parts if part["type"] == "image"]
    videos = [part["video"] for part in parts if part["type"] == "video"]
    frames = [np.stack([np.asarray(Image.open(root / name)) for name in names]) for names in videos]
    metadata = [
        {"fps": 2, "total_num_frames": len(names), "frames_indices": list(range(len(names)))} for names in videos
    ]
    more = {"videos": frames, "video_metadata": metadata, "do_sample_frames": False} if videos else {}
    return processor(text=[text], images=stills or None, return_tensors="pt", **more)


@pytest.mark.parametrize("family", FILMS)
def test_documents_with_videos_are_as_alone(family: str, tmp_path: Path) -> None:
    processor, model = processor_of(family, films=True), model_of(family).double().eval()
    packing_without_sync(model)  # as every run does
    module = ImageTextModule(model, processor=processor)
    lines = films(tmp_path, same=family in ("llava_onevision", "internvl"))
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    dm = ImageTextDataModule(str(path), seq_len=320, micro_batch_size=2)
    connect(module, None, dm)
    seen = check_documents(
        module, dm, model, lambda i: by_transformers(processor, lines[i], tmp_path), lambda i: "a cat " * (i + 1)
    )
    assert sorted(seen) == list(range(len(lines)))


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Rows with lists of frames whose folder is `tmp_path`."""
    return films(tmp_path, same=False)


def prepared(rows: list[dict[str, Any]], family: str, root: Path, films: bool = True, **options: Any) -> Any:
    dm = ImageTextDataModule(
        rows, processor=processor_of(family, films), image_root=root, seq_len=320, cache=False, packing=False, **options
    )
    dm.prepare()
    return dm


def test_what_videos_cannot_be(rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(50, 40).save(tmp_path / "other.png")
    (tmp_path / "film.mp4").write_bytes(b"no film")

    def asked(video: Any, **more: Any) -> list[dict[str, Any]]:
        part = {"type": "video", "video": video, **more}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
        return [{"messages": [{"role": "user", "content": [part]}, answer]}]

    alike = r"row 0 of the data: .* differ in size: .*60 × 30 .* 40 × 50"
    for made, family, options, message in (
        (rows[:2] + rows[3:], "llava_onevision", {}, "row 2 of .* LlavaOnevisionProcessor stacks videos, .* have 2, 3"),
        (rows[:1] + asked(["0-0-0.png"] * 3), "internvl", {}, "InternVLProcessor stacks videos, .* have 3, 4"),
        (rows[:1], "llava", {"films": False, "videos": "processor"}, "LlavaProcessor has no part for videos"),
        (rows, "qwen3_vl", {"films": False, "videos": "processor"}, "has no part for videos. Set videos='pictures'"),
        (asked(["0-0-0.png", "other.png"]), "qwen3_vl", {}, alike),
        (asked([]), "qwen3_vl", {}, "row 0 of the data: a video has no frames"),
        (asked(["0-0-0.png", "film.mp4"]), "qwen3_vl", {}, "a frame of a video is given as 'film.mp4'"),
        (asked("none.mp4"), "qwen3_vl", {}, "video 'none.mp4' does not exist"),
        (asked("../film.mp4"), "qwen3_vl", {}, "video '../film.mp4' leads out of image_root"),
        (asked("https://example.org/a.mp4"), "qwen3_vl", {}, "on the network"),
        (asked(["0-0-0.png"] * 2, fps=0), "qwen3_vl", {}, "fps=0. It must be"),
        (rows, "qwen3_vl", {"video_fps": -1}, "video_fps=-1"),
        (rows, "qwen3_vl", {"videos": "never"}, "videos='never'. Allowed: 'auto', 'pictures', 'processor'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            prepared(made, family, tmp_path, **options)
    monkeypatch.setattr(videos, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"film.mp4' is a file, and no package that decodes .* torchcodec, av, cv2"):
        prepared(asked("film.mp4"), "qwen3_vl", tmp_path)


def test_times_of_frames_and_how_they_are_shown(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """The row says the frames per second, or the data module; frames are pictures on request."""
    del rows[0]["messages"][0]["content"][0]["fps"]
    with pytest.warns(UserWarning, match=r"1 videos do not say their frames per second, so Qwen3VLProcessor guesses"):
        plain = prepared(rows[:1], "qwen3_vl", tmp_path)
    texts = {"plain": plain, "said": prepared(rows[:1], "qwen3_vl", tmp_path, video_fps=1)}
    texts["pictures"] = prepared(rows[:1], "qwen3_vl", tmp_path, videos="pictures")
    batches = {name: dm.first_batch()[0] for name, dm in texts.items()}
    tokenizer = plain.load_tokenizer()
    found = {name: tokenizer.decode(batch["input_ids"][0]) for name, batch in batches.items()}
    assert "<0.0 seconds>" in found["plain"]
    assert "<0.5 seconds>" in found["said"]
    assert "<2.5 seconds>" in found["said"]
    assert "seconds" not in found["pictures"]
    assert found["pictures"].count("<|vision_start|>") == 4
    assert "pixel_values_videos" in batches["said"]
    assert "pixel_values_videos" not in batches["pictures"]
    large = prepared(rows[:1], "qwen3_vl", tmp_path, video_fps=1, min_pixels=20_000).first_batch()[0]
    assert len(large["pixel_values_videos"]) > len(batches["said"]["pixel_values_videos"])


def test_a_run_goes_on_in_the_middle_of_an_epoch(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    dm = prepared(rows, "qwen2_5_vl", tmp_path)
    dm.global_batch_size, dm.micro_batch_size = 1, 1
    whole = [batch for (batch,) in dm.train_dataloader()]
    loader = dm.train_dataloader()
    steps = iter(loader)
    next(steps)
    state = loader.state_dict()
    again = dm.train_dataloader()
    again.load_state_dict(state)
    rest = [batch for (batch,) in again]
    assert len(rest) == len(whole) - 1
    for got, want in zip(rest, whole[1:]):
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert torch.equal(got[key], value) if isinstance(value, torch.Tensor) else got[key] == value, key


def test_a_file_is_sampled_as_transformers_does(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    frames = np.stack([np.asarray(picture(48, 64, seed=number)) for number in range(12)])
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=6)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "film.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    row = {"question": "what?", "answer": "noise", "video": "film.mp4"}
    for family, rate in (("qwen3_vl", 3), ("qwen3_vl", None), ("qwen2_5_vl", 2), ("qwen2_5_vl", None)):
        dm = prepared([row], family, tmp_path, video_fps=rate)
        got, processor = dm.first_batch()[0], dm.load_processor()
        turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what?"}]}
        answer = {"role": "assistant", "content": "noise"}
        options: dict[str, Any] = {"fps": rate, "do_sample_frames": True} if rate else {}
        want = processor(
            text=[processor.apply_chat_template([turn, answer], tokenize=False)],
            videos=[frames],
            video_metadata=[{"fps": 6.0, "total_num_frames": 12, "duration": 2.0, "frames_indices": list(range(12))}],
            return_tensors="pt",
            **options,
        )
        for key in ("pixel_values_videos", "video_grid_thw"):
            assert torch.equal(got[key], want[key]), (family, rate, key)
        length = want["input_ids"].shape[1]
        assert torch.equal(got["input_ids"][0, :length], want["input_ids"][0]), (family, rate)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_a_video_is_asked_about(family: str, tmp_path: Path) -> None:
    """With a picture before it; the model reads what plain transformers gives it."""
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in (10, 1, 2, 3):
        picture(50, 40, seed=number).save(frames / f"{number}.png")
    picture(60, 40, seed=7).save(tmp_path / "still.png")
    processor = processor_of(family, films=True)
    asked = {"images": [tmp_path / "still.png"], "videos": [frames]}
    got = VisualPrompt(processor, **asked, fps=2).inputs([{"role": "user", "content": "what happens?"}])

    parts = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "what happens?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    clip = np.stack([np.asarray(Image.open(frames / f"{number}.png")) for number in (1, 2, 3, 10)])
    metadata = [{"fps": 2, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}]
    want = processor(
        text=[text], images=[Image.open(tmp_path / "still.png")], videos=[clip], video_metadata=metadata,
        do_sample_frames=False, return_tensors="pt",
    )  # fmt: skip
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, msg=name)


def test_frames_are_pictures_for_a_processor_without_videos(tmp_path: Path) -> None:
    folder, frames = folder_of("llava", tmp_path), tmp_path / "frames"
    processor = processor_of("llava")
    frames.mkdir()
    with pytest.raises(ValueError, match="is an empty folder"):
        VisualPrompt(processor, videos=[frames])
    for number in range(2):
        picture(50, 40, seed=number).save(frames / f"{number}.png")
    conversation = [{"role": "user", "content": "what happens?"}]
    got = VisualPrompt(processor, videos=[frames]).inputs(conversation)
    want = VisualPrompt(processor, images=[frames / "0.png", frames / "1.png"]).inputs(conversation)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    with pytest.raises(ValueError, match=r"--video .*film.mp4: LlavaProcessor has no part for videos.* --video FOLDER"):
        VisualPrompt(processor, videos=[tmp_path / "film.mp4"])
    asked = {"max_new_tokens": 4, "temperature": 1.0, "seed": 1}
    by_video = generate(folder, "what happens?", videos=[frames], **asked)
    assert by_video == generate(folder, "what happens?", images=[frames / "0.png", frames / "1.png"], **asked)
