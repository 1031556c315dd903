"""Reading pictures and rows: every form that people write, and what is refused by name."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value, Video, load_from_disk
from PIL import Image as PILImage

from automodel_trainer import CausalLMModule, ChatDataModule, ImageTextDataModule, ImageTextModule
from automodel_trainer.connect import connect
from automodel_trainer.data.formats import detect_format
from automodel_trainer.data.pictures.files import ORIENTATION, Pictures
from automodel_trainer.data.pictures.given import undecoded
from automodel_trainer.data.pictures.rows import RowReader
from tests.tiny import tiny_model, tiny_tokenizer
from tests.vlm.families import model_of, picture, processor_of


def saved(path: Path, image: PILImage.Image, **options: Any) -> str:
    image.save(path, **options)
    return path.name


def test_a_header_says_the_size_of_the_decoded_picture(tmp_path: Path) -> None:
    exif = PILImage.Exif()
    exif[ORIENTATION] = 6  # turned by a quarter
    noise = picture(30, 50)
    files = {
        "plain.png": (noise, {}),
        "turned.jpg": (noise, {"exif": exif}),
        "turned.png": (noise, {"exif": exif}),
        "cmyk.jpg": (noise.convert("CMYK"), {}),
        "palette.gif": (noise.convert("P"), {}),
        "grey.png": (noise.convert("L"), {}),
        "alpha.png": (noise.convert("RGBA"), {}),
        "photo.webp": (noise, {}),
        "turned.tif": (noise, {"exif": exif}),
    }
    reader = Pictures(tmp_path)
    for name, (image, options) in files.items():
        saved(tmp_path / name, image, **options)
        read = reader.read(name)
        assert read.size == reader.size(name) == ((30, 50) if "turned" in name else (50, 30)), name
        assert read.mode == "RGB", name
    np.testing.assert_array_equal(np.array(reader.read("plain.png")), np.array(noise))
    np.testing.assert_array_equal(np.array(reader.read("turned.png")), np.rot90(np.array(noise), -1))
    for source in (noise, (tmp_path / "plain.png").read_bytes(), {"bytes": (tmp_path / "plain.png").read_bytes()}):
        np.testing.assert_array_equal(np.array(reader.read(source)), np.array(noise))
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "plain.png").read_bytes()).decode()
    np.testing.assert_array_equal(np.array(reader.read(url)), np.array(noise))


def test_limits_of_pixels_hold_for_header_and_picture(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", picture(300, 200))
    for reader, low, high in ((Pictures(tmp_path, None, 1000), 800, 1000), (Pictures(tmp_path, 10**5), 10**5, 102_000)):
        size = reader.size("a.png")
        assert reader.read("a.png").size == size
        assert low <= size[0] * size[1] <= high
        assert size[1] / size[0] == pytest.approx(1.5, rel=0.06)
    assert Pictures(tmp_path, None, 1000).scaled(1, 10**5) == (1, 1000)


def test_bad_pictures_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "whole.png", picture(60, 60))
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    frames = [picture(20, 20, seed=i) for i in range(3)]
    saved(tmp_path / "moves.gif", frames[0], save_all=True, append_images=frames[1:])
    saved(tmp_path / "deep.png", PILImage.fromarray(np.full((9, 9), 60_000, np.uint16)))
    outside = tmp_path.parent / "outside.png"
    outside.write_bytes(data)
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(outside)
    reader = Pictures(tmp_path)
    for source, message in (
        ("cut.png", r"'cut.png' cannot be decoded, it may be truncated"),
        ("text.png", "'text.png' is no picture that Pillow knows"),
        ("empty.png", "'empty.png' is no picture that Pillow knows"),
        ("moves.gif", r"'moves.gif' is animated or has several pages \(3 frames, GIF\)"),
        ("deep.png", "'deep.png' has pixels of mode"),
        ("none.png", "'none.png' does not exist in"),
        ("../outside.png", "leads out of image_root"),
        (str(outside), "leads out of image_root"),
        ("https://example.org/a.png", "is on the network"),
        ("data:image/png,abc", "it must be data:image/…;base64,…"),
        ("data:image/png;base64,*", "no valid base64"),
        ("a" * 300, "'aaaa.*…' is no picture that Pillow knows"),
        ("a." * 300, "cannot be the path of a file"),
        (7, "a picture is a int"),
    ):
        with pytest.raises(ValueError, match=message):
            reader.read(source)
    with pytest.raises(ValueError, match="leads out of image_root"):
        Pictures(root).size("link.png")
    assert Pictures(root, more_roots=(tmp_path, tmp_path.parent)).size("link.png") == (60, 60)
    with pytest.raises(ValueError, match="give image_root"):
        Pictures().size("whole.png")
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="too large to be decoded safely"):
        reader.size("whole.png")


USER = {"role": "user", "content": "<image>look"}
ANSWER = {"role": "assistant", "content": "yes"}
CODED = {"type": "image", "base64": f"data:image/png;base64,{base64.b64encode(b'picture').decode()}"}
OPENAI = {"type": "image_url", "image_url": {"url": "a"}}
NAMED = {"type": "image", "file": "a.png"}
SHAREGPT = [{"from": "human", "value": "<image>look"}, {"from": "gpt", "value": "yes"}]
SHOWN = [{"type": "image"}, {"type": "text", "text": "look"}]


@pytest.mark.parametrize(
    ("row", "sources"),
    [
        ({"messages": [USER, ANSWER], "images": ["a"]}, ["a"]),
        ({"messages": json.dumps([USER, ANSWER]), "image": "a"}, ["a"]),
        ({"messages": [{**USER, "content": "look"}, ANSWER], "images": ["a"]}, ["a"]),  # as TRL: first in the turn
        ({"messages": [{**USER, "content": SHOWN}, ANSWER], "image": "a"}, ["a"]),
        ({"messages": [{**USER, "content": [{"type": "image", "image": "a"}, SHOWN[1]]}, ANSWER]}, ["a"]),
        ({"messages": [{**USER, "content": [OPENAI, SHOWN[1]]}, ANSWER]}, ["a"]),
        ({"conversations": SHAREGPT, "image": "a"}, ["a"]),
        ({"prompt": "<image>look", "completion": "yes", "images": ["a"]}, ["a"]),
        ({"question": "<image>look", "answer": "yes", "image": "a"}, ["a"]),
        ({"prompt": [USER], "completion": [ANSWER], "images": ["a"]}, ["a"]),
        ({"messages": [{**USER, "content": [{"type": "video", "video": ["a"]}, SHOWN[1]]}, ANSWER]}, ["a"]),
        ({"messages": [{**USER, "content": "<video>look"}, ANSWER], "videos": [["a"]]}, ["a"]),
        ({"question": "look", "answer": "yes", "video": ["a"]}, ["a"]),
        ({"messages": [{**USER, "content": [{"image": "a"}, {"text": "look"}]}, ANSWER]}, ["a"]),  # parts without types
        ({"messages": [{**USER, "content": [CODED, SHOWN[1]]}, ANSWER]}, [b"picture"]),
        ({"messages": [{**USER, "content": [{**SHOWN[0], "index": 0}, SHOWN[1]]}, ANSWER], "images": ["a"]}, ["a"]),
        ({"messages": [USER, ANSWER], "image": "[1] a.png"}, ["[1] a.png"]),
        ({"texts": [{"user": "<image>look", "assistant": "yes", "source": "web"}], "images": ["a"]}, ["a"]),
    ],
)  # fmt: skip
def test_forms_of_rows(row: dict[str, Any], sources: list[str]) -> None:
    found = RowReader(detect_format(row)).read(row)
    assert found.sources == sources
    assert [(m["role"], m["content"]) for m in found.conversation.messages] == [
        ("user", SHOWN),
        ("assistant", [{"type": "text", "text": "yes"}]),
    ]


def test_several_pictures_keep_their_order() -> None:
    parts = [{"type": "image", "image": "own"}, {"type": "text", "text": "and <image> and "}, {"type": "image"}]
    row = {"messages": [{"role": "user", "content": parts}, ANSWER], "images": ["first", "second"]}
    found = RowReader(detect_format(row)).read(row)
    assert found.sources == ["own", "first", "second"]
    kinds = [part.get("text", "picture") for part in found.conversation.messages[0]["content"]]
    assert kinds == ["picture", "and ", "picture", " and ", "picture"]


def test_pictures_stand_in_the_order_of_the_conversation() -> None:
    """The system's text comes from a column of its own, and its picture from the column of pictures."""
    prompt = [{"role": "user", "content": [{"type": "image", "image": "own"}]}]
    row = {"prompt": prompt, "completion": "yes", "system": "<image>", "image": "first"}
    assert RowReader(detect_format(row)).read(row).sources == ["first", "own"]


def test_the_result_of_a_tool_is_no_list_of_parts() -> None:
    result = [{"type": "weather", "degrees": 5}]
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    row = {"messages": [USER, called, {"role": "tool", "content": result}, ANSWER], "images": ["a"]}
    found = RowReader(detect_format(row)).read(row).conversation.messages[2]["content"]
    assert found == [{"type": "text", "text": json.dumps(result)}]


def test_columns_of_pictures_may_be_mapped() -> None:
    row = {"question": "look", "answer": "yes", "photo": "a", "image": "b"}
    assert RowReader(detect_format(row, {"images": "photo"})).read(row).sources == ["a"]
    with pytest.raises(ValueError, match=r"column of pictures \('images'\)"):
        ChatDataModule([row], tokenizer=tiny_tokenizer(), columns={"images": "photo"}).prepare()


def test_a_video_is_its_frames() -> None:
    parts = [{"type": "video", "video": ["v0", "v1"]}, {"type": "text", "text": "<video>, <image>"}, {"type": "video"}]
    row = {"messages": [{"role": "user", "content": parts}, ANSWER], "images": ["a"], "videos": [["w"], ["x0", "x1"]]}
    found = RowReader(detect_format(row)).read(row)
    assert found.sources == ["v0", "v1", "w", "a", "x0", "x1"]
    kinds = [part.get("text", "picture") for part in found.conversation.messages[0]["content"]]
    assert kinds == ["picture", "picture", "picture", ", ", "picture", "picture", "picture"]
    earlier = {"instruction": "<video>", "output": "c", "history": [["<video>", "b"]], "videos": [["x", "y"], ["z"]]}
    assert RowReader(detect_format(earlier)).read(earlier).sources == ["x", "y", "z"]
    plain = {"messages": [{**USER, "content": "the tag <video>"}, ANSWER]}  # no column of videos
    assert (
        RowReader(detect_format(plain)).read(plain).conversation.messages[0]["content"][0]["text"] == "the tag <video>"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, ANSWER], "images": ["a", "b"]}, r"1 mark\(s\) .* 2 picture\(s\)"),
        ({"messages": [USER, ANSWER], "images": []}, r"1 mark\(s\) .* 0 picture\(s\)"),
        ({"messages": [{**USER, "content": [{"type": "audio", "audio": "a"}]}, ANSWER]}, "type 'audio'"),
        ({"messages": [{**USER, "content": [{"type": "video", "video": "a"}]}, ANSWER]}, "given as 'a', .* a picture"),
        ({"messages": [{**USER, "content": "look"}, ANSWER], "videos": ["a.mp4"]}, "given as 'a.mp4'"),
        ({"messages": [{**USER, "content": "look"}, ANSWER], "video": {"path": "b.webm"}}, "given as 'b.webm'"),
        ({"messages": [{**USER, "content": "<video>"}, ANSWER], "videos": []}, r"1 mark\(s\) for videos .* 0 video"),
        ({"question": "?", "answer": "<video>", "video": ["a"]}, "turn has a video"),
        ({"messages": [{**USER, "content": "look"}, ANSWER], "videos": [[]]}, "no frames"),
        ({"messages": [USER, {**ANSWER, "content": "<image>"}], "images": ["a", "b"]}, "turn has a picture"),
        ({"messages": [ANSWER], "images": ["a"]}, "no user's turn"),
        ({"question": "is <image 1> one?", "answer": "yes", "image": "a"}, "has '<image 1>', which looks like one"),
        ({"messages": [{**USER, "content": [{"type": "text", "value": "look"}]}, ANSWER]}, "has no 'text'"),
        ({"messages": [{**USER, "content": [NAMED]}, ANSWER], "images": ["b"]}, "shows under 'file'"),
        ({"messages": [{**USER, "content": [SHOWN[0] | {"index": 1}]}, ANSWER], "images": ["b"]}, "says index 1"),
        ({"messages": [{**USER, "content": [{"image": "a", "max_pixels": 9}]}, ANSWER]}, "has max_pixels, which is"),
        ({"messages": [{**USER, "content": [{"type": "image", "base64": "*"}]}, ANSWER]}, "no valid base64"),
        ({"messages": [USER, ANSWER], "images": ["a"], "image": "b"}, "in two columns, 'images' and 'image'"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowReader(detect_format(row)).read(row)


def test_sources_of_rows_become_the_same_tensors(tmp_path: Path) -> None:
    image = picture(40, 60)
    name = saved(tmp_path / "a.png", image)
    data = (tmp_path / name).read_bytes()
    chat = {"messages": [USER, ANSWER]}
    (tmp_path / "train.jsonl").write_text(json.dumps({**chat, "images": [name]}))
    links = tmp_path / "links"
    links.mkdir()
    (links / name).symlink_to(tmp_path / name)
    roots = [str(links), str(tmp_path)]
    typed = Features({"messages": List({"role": Value("string"), "content": Value("string")}), "images": List(Image())})
    whole = Dataset.from_list([{**chat, "images": [{"bytes": data, "path": None}]}], features=typed)
    whole.to_parquet(str(tmp_path / "train.parquet"))
    made = []
    for train in (
        str(tmp_path / "train.jsonl"),
        str(tmp_path / "train.parquet"),
        whole,
        [{**chat, "images": [image]}],
        [{**chat, "image": data}],
        [{**chat, "images": ({"bytes": data, "path": None},)}],
        [{**chat, "image": bytearray(data)}],
        [{**chat, "image": np.array(image)}],
        [{**chat, "image": base64.b64encode(data).decode()}],
        [{**chat, "image": {"url": f"file://{tmp_path}/a.png"}}],
        DatasetDict(train=whole),
        [{**chat, "image": name}],
    ):
        dm = ImageTextDataModule(
            train,
            processor=processor_of("llava"),
            seq_len=64,
            packing=False,
            cache=False,
            image_root=roots,
        )
        made.append(dm.first_batch()[0])
    for batch in made[1:]:
        for key in ("input_ids", "labels", "pixel_values"):
            assert batch[key].equal(made[0][key]), key


def test_a_saved_data_set_is_not_copied(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"images": [picture(4, 4)]}] * 2, features=Features({"images": List(Image())}))
    rows.save_to_disk(str(tmp_path / "saved"))
    chosen = load_from_disk(str(tmp_path / "saved")).select([1])
    read = undecoded(chosen)
    assert read.cache_files == chosen.cache_files != []
    assert list(read[0]["images"][0]) == ["bytes", "path"]
    assert isinstance(chosen[0]["images"][0], PILImage.Image)


def test_refusals_of_the_data_module(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", picture(40, 60))
    chat = {"messages": [USER, ANSWER]}

    def prepared(rows: Any, **options: Any) -> None:
        dm = ImageTextDataModule(rows, processor=processor_of("llava"), cache=False, **options)
        dm.prepare()

    grey = Dataset.from_list([{**chat, "image": picture(4, 4)}]).cast_column("image", Image(mode="L"))
    for rows, options, message in (
        ([{**chat, "images": ["a.png"]}], {}, "row 0 of the data: .*give image_root"),
        ([{**chat, "images": ["b.png"]}], {"image_root": tmp_path}, "row 0 of the data: .*does not exist"),
        ([{**chat, "images": ["a.png"]}], {"image_root": tmp_path, "seq_len": 8}, "no sample is left"),
        ([{**chat, "images": ["a.png"]}], {"image_root": tmp_path / "none"}, "is no folder"),
        ([{**chat, "images": ["a.png"]}], {"overlong": "truncate"}, "is not cut"),
        ([{"messages": [{"role": "user", "content": "a <image>"}, ANSWER]}], {"image_mark": "@"}, "wrote 1 marks"),
        (
            [{"question": "?", "answer": "!", "photo": "a.png"}],
            {},
            r"the column 'photo' has some.*\{\"images\": \"photo\"\}",
        ),
        (
            [{"prompt": "<image>", "completion": "bad", "image": "a.png", "label": False}],
            {},
            "The data has preferences",
        ),
        (Dataset.from_list([{"question": "?", "answer": "!"}]).with_transform(dict), {}, "has a transform"),
        ([{"question": "<img>a.png</img>?", "answer": "!"}], {}, "a text names one: '<img>a.png</img>'"),
        (grey, {}, r"datasets.Image\(mode='L'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(rows, **options)
    soft = [{"messages": [{"role": "user", "content": "<image_soft_token>"}, ANSWER]}]
    with pytest.raises(ValueError, match="row 0 of the data: a text has '<image_soft_token>'"):
        ImageTextDataModule(soft, processor=processor_of("gemma3"), cache=False).prepare()
    with pytest.raises(ValueError, match=r"would train on the text alone\. Use ImageTextDataModule"):
        ChatDataModule([{**chat, "images": ["a.png"]}], tokenizer=tiny_tokenizer()).prepare()
    with pytest.raises(ValueError, match=r"column of videos \('videos'\), .*Use ImageTextDataModule"):
        ChatDataModule([{**chat, "videos": [["a.png"]]}], tokenizer=tiny_tokenizer()).prepare()
    film = {"bytes": b"film", "path": "film.mp4"}
    typed = Features({"question": Value("string"), "answer": Value("string"), "video": Video()})
    with pytest.raises(ValueError, match=r"row 0 of the data: a video is given as 'film.mp4'"):
        prepared(Dataset.from_list([{"question": "?", "answer": "!", "video": film}], features=typed))
    parts = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, ANSWER]
    with pytest.raises(ValueError, match="Use ImageTextDataModule"):
        ChatDataModule([{"messages": parts}], tokenizer=tiny_tokenizer()).prepare()
    with pytest.raises(ValueError, match="trains models of text alone"):
        connect(CausalLMModule(tiny_model()), None, ImageTextDataModule([{**chat, "image": "a.png"}]))
    with pytest.raises(ValueError, match="names no folder with a processor"):
        connect(ImageTextModule(model_of("llava")), None, ImageTextDataModule([{**chat, "image": "a.png"}]))


def test_a_picture_that_changed_is_found(tmp_path: Path) -> None:
    for number in range(2):
        saved(tmp_path / f"{number}.png", picture(40, 60))
    rows = [{"messages": [USER, ANSWER], "images": [f"{number}.png"]} for number in range(2)]
    dm = ImageTextDataModule(
        rows, processor=processor_of("idefics3"), seq_len=256, image_root=tmp_path, cache=False, packing=False
    )
    dm.prepare()
    saved(tmp_path / "1.png", picture(200, 30))
    with pytest.raises(ValueError, match=r"row 1 of the data: .* were planned from the sizes"):
        list(dm.train_dataloader())


def test_rows_of_another_folder_are_planned_anew(tmp_path: Path) -> None:
    """The same rows name other pictures there; the cache of the first folder's has other sizes."""
    for folder, size in ((tmp_path / "small", (30, 30)), (tmp_path / "large", (90, 140))):
        folder.mkdir()
        saved(folder / "a.png", picture(*size))
        (folder / "rows.jsonl").write_text(json.dumps({"question": "?", "answer": "!", "image": "a.png"}))
        dm = ImageTextDataModule(str(folder / "rows.jsonl"), processor=processor_of("qwen2_5_vl"), seq_len=128)
        pixels = dm.first_batch()[0]["image_grid_thw"].prod()
        assert (pixels > 50) == (folder.name == "large")


def test_bytes_may_be_in_memory() -> None:
    stream = io.BytesIO()
    picture(12, 9).save(stream, "PNG")
    assert Pictures().size(stream.getvalue()) == (9, 12)


def test_what_the_model_does_not_see_is_said(tmp_path: Path) -> None:
    saved(tmp_path / "a.png", picture(40, 60))
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "?", "answer": "!"}))
    with pytest.warns(UserWarning, match=r"1 pictures lie there \(a.png, …\): the model is trained on text alone"):
        ImageTextDataModule(str(tmp_path / "train.jsonl"), processor=processor_of("llava"), cache=False).prepare()
    silent = {"messages": [USER, {**ANSWER, "content": ""}, {**USER, "content": "well?"}, ANSWER], "image": "a.png"}
    shown = {"messages": [{**USER, "content": "<image>"}, ANSWER], "image": "a.png"}  # a picture says something
    dm = ImageTextDataModule([shown, silent], processor=processor_of("llava"), cache=False, image_root=tmp_path)
    with pytest.warns(UserWarning, match="1 conversations have a turn without content or calls.*: row 1 of the data"):
        dm.prepare()
