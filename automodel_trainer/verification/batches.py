"""The first micro-batches of a user's data, cut short, with their token ids renumbered from 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from automodel_trainer.data.base import MicroBatchDataModule
from automodel_trainer.data.batches import MicroBatch
from automodel_trainer.nn.constants import IGNORE_INDEX
from automodel_trainer.strategies import Objective

ENDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def first_steps(
    objective: Objective, data: Any, steps: int, per_step: int, length: int, rows: int = 2
) -> list[list[MicroBatch]]:
    """`steps` lists of `per_step` micro-batches, in the order of the data. Short data repeats.

    If there are pictures, all micro-batches have some: a layout that hangs without them is another matter.

    Args:
        objective: counts the targets of a micro-batch.
        data: a data module, or an iterable of batches (a micro-batch, or a list of them).
        length: tokens of a row; a longer row is cut to the window with the most labels.
        rows: of a micro-batch, at most.

    Raises:
        ValueError: there is no data, or it has no labels.
    """
    wanted = steps * per_step
    plain: list[MicroBatch] = []
    pictured: list[MicroBatch] = []
    for micro_batch in _stream(data):
        (pictured if _has_pictures(micro_batch) else plain).append(_cut(micro_batch, length, rows))
        if len(pictured) == wanted or (not pictured and len(plain) == wanted):
            break
    found = pictured or plain
    if not any(objective.count(micro_batch) for micro_batch in found):
        raise ValueError("There is nothing to verify with: no batch of the data has a supervised token.")
    found = [found[i % len(found)] for i in range(wanted)]
    return [found[i : i + per_step] for i in range(0, wanted, per_step)]


def _stream(data: Any) -> Iterator[MicroBatch]:
    if isinstance(data, MicroBatchDataModule):
        data.setup("fit")
        data = data.build_train_loader()
    elif isinstance(data, pl.LightningDataModule):
        data.prepare_data()
        data.setup("fit")
        data = data.train_dataloader()
    for batch in data:
        yield from [dict(batch)] if isinstance(batch, Mapping) else batch


def _has_pictures(micro_batch: MicroBatch) -> bool:
    """Whether there is more in it than numbers of tokens."""
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in micro_batch.values())


def _cut(micro_batch: MicroBatch, length: int, rows: int) -> MicroBatch:
    """The first rows. Tensors `[b, s]` are also cut to the window of columns with the most labels.

    With pictures a micro-batch stays whole: which of its rows a picture belongs to depends on the model.
    """
    if _has_pictures(micro_batch):
        length, rows = micro_batch["input_ids"].shape[1], len(micro_batch["input_ids"])
    shape = micro_batch["input_ids"].shape
    length = min(length, shape[1])
    labels = micro_batch.get("labels")
    start = _window(labels[:rows], length) if isinstance(labels, Tensor) and labels.shape == shape else 0
    cut = {key: value for key, value in micro_batch.items() if key not in ("sample_ids", "document_lengths")}
    for key, value in cut.items():
        if isinstance(value, Tensor) and value.shape == shape:
            cut[key] = value[:rows, start : start + length].clone()
        elif isinstance(value, Tensor) and value.shape[:1] == shape[:1]:
            cut[key] = value[:rows].clone()
    return cut


def _window(labels: Tensor, length: int) -> int:
    """The first column of the window of `length` columns with the most labels, in labels `[b, s]`."""
    counts = (labels != IGNORE_INDEX).sum(0).cumsum(0)
    counts = torch.cat([counts.new_zeros(1), counts])
    return int((counts[length:] - counts[:-length]).argmax())


def renumber(objective: Objective, steps: list[list[MicroBatch]], config: PreTrainedConfig) -> int:
    """Renumber the token ids in use from 0, in place, in batches and config. Returns how many ids there are now.

    A vocabulary of a hundred thousand would make up most of a small model, and most of its time.
    """
    keys = ("input_ids", "labels") if objective.labels_are_tokens else ("input_ids",)
    batches = [micro_batch for step in steps for micro_batch in step]
    used = torch.cat([m[key].flatten() for m in batches for key in keys]).unique()
    used = used[used != IGNORE_INDEX]
    for micro_batch in {id(m): m for m in batches}.values():  # each once: short data repeats its micro-batches
        for key in keys:
            ids = micro_batch[key]
            micro_batch[key] = torch.where(ids == IGNORE_INDEX, ids, torch.searchsorted(used, ids))
    text = config.get_text_config(decoder=True)
    numbers = {int(old): new for new, old in enumerate(used)}
    for name in ENDS:
        for part in {id(config): config, id(text): text}.values():
            old = getattr(part, name, None)
            if isinstance(old, int):  # one that no batch uses stays one: some models look for their padding id
                setattr(part, name, numbers.setdefault(old, len(numbers)))
            elif old is not None:
                setattr(part, name, None)
    for part in {id(config): config, id(text): text}.values():  # ids of pictures, and of what stands around them
        for name, old in part.to_dict().items():
            if name.endswith(("_token_id", "_token_index")) and name not in ENDS and isinstance(old, int) and old >= 0:
                setattr(part, name, numbers.setdefault(old, len(numbers)))
    return len(numbers)
