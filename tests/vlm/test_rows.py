"""Rows with pictures against plain transformers, for ten families: ids, masks, and packed documents as alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from automodel_trainer import ImageTextDataModule, ImageTextModule
from automodel_trainer.connect import connect
from automodel_trainer.models._masks import packing_without_sync
from tests.harness import close
from tests.vlm.families import ALL, model_of, processor_of, rows


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


@pytest.mark.parametrize("family", ALL)
def test_documents_are_as_alone(family: str, data: Path) -> None:
    processor, model = processor_of(family), model_of(family).double().eval()
    packing_without_sync(model)  # as every run does
    module = ImageTextModule(model, processor=processor)
    alone = family == "mllama"  # rows without pictures would see those of the row beside them
    dm = ImageTextDataModule(str(data), seq_len=256, micro_batch_size=1 if alone else 2)
    connect(module, None, dm)
    assert dm.packs == (family not in ("mllama", "qwen3_5")), dm.packing_obstacle
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    seen = []
    for (batch,) in dm.train_dataloader():
        inputs, _ = module.split(batch)
        for key, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                inputs[key] = value.double()
        with torch.no_grad():
            logits = model(**inputs).logits
        ids = iter(batch["sample_ids"])
        for row in range(len(batch["input_ids"])):
            lengths = batch["document_lengths"][row] if dm.packs else [int(batch["attention_mask"][row].sum())]
            start = 0
            for length in lengths:
                part = slice(start, start + length)
                start += length
                if (batch["input_ids"][row, part] == processor.tokenizer.pad_token_id).all():
                    continue  # padding
                sample = next(ids)
                seen.append(sample)
                alone = processor.apply_chat_template(
                    with_pictures(lines[sample], data.parent), tokenize=True, return_dict=True, return_tensors="pt"
                )
                assert batch["input_ids"][row, part].tolist() == alone["input_ids"][0].tolist()
                labels = batch["labels"][row, part]
                answer = lines[sample]["messages"][1]["content"][0]["text"]
                assert processor.tokenizer.decode(labels[labels != -100]) == answer + "<|im_end|>"
                alone = {k: v.double() if v.is_floating_point() else v for k, v in alone.items()}
                with torch.no_grad():
                    want = model(**alone, use_cache=False).logits[0]
                    close(logits[row, part], want, terms=length, dtype=torch.float32)  # of rotary positions
    assert sorted(seen) == list(range(len(lines)))
