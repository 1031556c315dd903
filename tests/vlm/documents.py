"""Documents of packed or padded rows against plain transformers, which sees each alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from automodel_trainer import ImageTextDataModule, ImageTextModule
from tests.harness import close


def check_documents(
    module: ImageTextModule,
    data: ImageTextDataModule,
    model: Any,
    alone_of: Callable[[int], Any],
    answer_of: Callable[[int], str],
) -> list[int]:
    """Compare ids, masks and logits of every document; returns their numbers in the order of the loader.

    Args:
        module: of `model`.
        data: connected.
        model: in fp64.
        alone_of: what plain transformers makes of a sample, by its number.
        answer_of: the text of a sample that is trained.
    """
    seen = []
    tokenizer = module.processor.tokenizer
    for (batch,) in data.train_dataloader():
        inputs, _ = module.split(batch)
        with torch.no_grad():
            logits = model(**as_double(inputs)).logits
        ids = iter(batch["sample_ids"])
        for row in range(len(batch["input_ids"])):
            lengths = batch["document_lengths"][row] if data.packs else [int(batch["attention_mask"][row].sum())]
            start = 0
            for length in lengths:
                part = slice(start, start + length)
                start += length
                if (batch["input_ids"][row, part] == tokenizer.pad_token_id).all():
                    continue  # padding
                sample = next(ids)
                seen.append(sample)
                alone = alone_of(sample)
                assert batch["input_ids"][row, part].tolist() == alone["input_ids"][0].tolist()
                labels = batch["labels"][row, part]
                assert tokenizer.decode(labels[labels != -100]) == answer_of(sample) + "<|im_end|>"
                with torch.no_grad():
                    want = model(**as_double(alone), use_cache=False).logits[0]
                    close(logits[row, part], want, terms=length, dtype=torch.float32)  # of rotary positions
    return seen


def as_double(inputs: Any) -> dict[str, Any]:
    """A model's inputs, its numbers that are not integers in fp64."""
    wide = {key: torch.is_tensor(value) and value.is_floating_point() for key, value in inputs.items()}
    return {key: value.double() if wide[key] else value for key, value in inputs.items()}
