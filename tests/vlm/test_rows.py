"""Rows with pictures against plain transformers, for many families: ids, masks, and packed documents as alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from automodel_trainer import ImageTextDataModule, ImageTextModule
from automodel_trainer.connect import connect
from automodel_trainer.models._masks import packing_without_sync
from tests.vlm.documents import check_documents
from tests.vlm.families import ALL, model_of, picture, processor_of, rows
from tests.vlm.more_families import MORE


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(folder))))
    return path


def with_pictures(row: dict[str, Any], root: Path) -> list[dict[str, Any]]:
    """The messages of a row with the pictures themselves, as transformers takes them; of a video its frames."""

    def shown(part: dict[str, Any]) -> list[dict[str, Any]]:
        names = part.get("video") or ([part["image"]] if "image" in part else [])
        return [{"type": "image", "image": Image.open(root / name)} for name in names] or [part]

    return [{**m, "content": [inner for part in m["content"] for inner in shown(part)]} for m in row["messages"]]


@pytest.mark.parametrize("family", [*ALL, *MORE])
def test_documents_are_as_alone(family: str, data: Path) -> None:
    processor, model = processor_of(family), model_of(family).double().eval()
    packing_without_sync(model)  # as every run does
    module = ImageTextModule(model, processor=processor)
    alone = family == "mllama"  # rows without pictures would see those of the row beside them
    dm = ImageTextDataModule(str(data), seq_len=256, micro_batch_size=1 if alone else 2)
    connect(module, None, dm)
    assert dm.packs == (family not in ("mllama", "qwen3_5")), dm.packing_obstacle
    lines = [json.loads(line) for line in data.read_text().splitlines()]

    def alone_of(sample: int) -> Any:
        messages = with_pictures(lines[sample], data.parent)
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")

    seen = check_documents(module, dm, model, alone_of, lambda i: lines[i]["messages"][1]["content"][0]["text"])
    assert sorted(seen) == list(range(len(lines)))


def test_a_processor_that_does_not_say_what_it_writes(data: Path) -> None:
    module = ImageTextModule(model_of("idefics2"), processor=processor_of("idefics2"))
    with pytest.raises(ValueError, match=r"Idefics2Processor does not say what it writes for a picture"):
        connect(module, None, ImageTextDataModule(str(data), seq_len=256))


def test_as_many_patches_as_tokens() -> None:
    """Tensors of pictures are no tensors of tokens, also where they are as long."""

    def batch(text: str) -> Any:
        turns = [{"role": "user", "content": f"<image>{text}"}, {"role": "assistant", "content": "yes"}]
        rows = [{"messages": turns, "image": picture(40, 60)}]
        dm = ImageTextDataModule(rows, processor=processor_of("gemma4"), seq_len=1024, packing=True, cache=False)
        return dm.first_batch()[0]

    short = batch("")
    patches, tokens = short["pixel_values"].shape[1], short["document_lengths"][0][0]
    long = batch("x" * (patches - tokens))
    assert long["document_lengths"][0][0] == patches
    for key in ("pixel_values", "image_position_ids"):
        assert long[key].equal(short[key]), key


def test_a_processor_that_does_not_resize() -> None:
    """It takes pictures of the right size alone, and blank ones have that of the data."""
    processor = processor_of("qwen2_5_vl")
    processor.image_processor.do_resize = False
    rows: list[dict[str, Any]] = [{"question": "?", "answer": "!", "image": picture(56, 56)}]
    dm = ImageTextDataModule([*rows, {"question": "?", "answer": "!"}], processor=processor, seq_len=128, cache=False)
    assert len(dm.first_batch()[0]["pixel_values"]) == 16
    assert list(dm.blank.input_ids).count(processor.image_token_id) == 4
