"""The processor that was trained with lies in every checkpoint and export, whichever argument it came by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from automodel_trainer import ImageTextDataModule, ImageTextModule, LoRAConfig, Trainer
from automodel_trainer.callbacks import HFExport
from automodel_trainer.checkpoint.merge import merge
from tests.test_trainer import quiet
from tests.vlm.families import folder_of, processor_of, rows

MEAN = [0.25, 0.5, 0.75]  # of the processor that is handed over; the folder's own has another


def other() -> Any:
    processor = processor_of("llava")
    processor.image_processor.image_mean = MEAN
    processor.chat_template = processor.tokenizer.chat_template = "{# other #}" + processor.chat_template
    return processor


def check(folder: Path) -> None:
    found: Any = AutoProcessor.from_pretrained(folder)
    assert list(found.image_processor.image_mean) == MEAN, folder
    assert found.chat_template.startswith("{# other #}"), folder


@pytest.mark.parametrize("way", ["module", "module path", "data", "data path", "LoRA"])
def test_the_processor_lies_everywhere(way: str, tmp_path: Path) -> None:
    folder = folder_of("llava", tmp_path)
    (tmp_path / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows(tmp_path, 4))))
    other().save_pretrained(tmp_path / "other")
    given = {"processor": str(tmp_path / "other") if "path" in way else other()}
    by_data = way.startswith("data")
    module = ImageTextModule(folder, lora=LoRAConfig(rank=2) if way == "LoRA" else None, **({} if by_data else given))
    data = ImageTextDataModule(
        str(tmp_path / "pictures.jsonl"), seq_len=256, global_batch_size=2, **(given if by_data else {})
    )
    trainer = Trainer(**quiet(tmp_path / "run", max_steps=1, callbacks=[HFExport(tmp_path / "exported")]))
    checkpoint = trainer.fit(module, data)
    trainer.save_pretrained(tmp_path / "saved")
    assert checkpoint is not None
    merge(checkpoint, tmp_path / "merged")  # what `amt export` writes
    for place in (checkpoint / "model", tmp_path / "exported", tmp_path / "saved", tmp_path / "merged"):
        check(place)
