from __future__ import annotations

from typing import Any

import pytest
import torch

from automodel_trainer.data import MockDataModule
from automodel_trainer.nn.constants import IGNORE_INDEX
from tests.tiny import tiny_tokenizer


def module(**options: Any) -> MockDataModule:
    defaults: dict[str, Any] = {"vocab_size": 50, "seq_len": 16, "num_samples": 10}
    data = MockDataModule(**{**defaults, **options})
    data.setup("fit")
    return data


def rows(data: MockDataModule) -> dict[int, list[int]]:
    return {
        batch["sample_ids"][i]: batch["input_ids"][i].tolist()
        for step in data.train_dataloader()
        for batch in step
        for i in range(len(batch["sample_ids"]))
    }


def test_tokens_are_random_never_zero_and_all_trained_but_the_first() -> None:
    batches = [batch for step in module().train_dataloader() for batch in step]
    tokens = torch.cat([batch["input_ids"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    assert tokens.shape == (10, 16)
    assert 0 < int(tokens.min()) <= int(tokens.max()) < 50
    assert len({tuple(row.tolist()) for row in tokens}) == 10
    assert (labels[:, 0] == IGNORE_INDEX).all()
    assert torch.equal(labels[:, 1:], tokens[:, 1:])


def test_rows_depend_on_the_seed_alone() -> None:
    assert rows(module()) == rows(module(micro_batch_size=2, global_batch_size=4))
    assert rows(module()) != rows(module(seed=1))


def test_validation_rows_are_others() -> None:
    data = module(val_samples=3)
    validation = [batch["input_ids"][0].tolist() for step in data.val_dataloader() for batch in step]
    assert len(validation) == 3
    assert not any(row in rows(data).values() for row in validation)


def test_the_vocabulary_is_given_or_the_tokenizers() -> None:
    data = MockDataModule(seq_len=16, num_samples=4)
    with pytest.raises(ValueError, match="vocab_size"):
        data.setup("fit")
    data.tokenizer = tiny_tokenizer()
    data.setup("fit")
    assert max(max(row) for row in rows(data).values()) < len(tiny_tokenizer())


@pytest.mark.parametrize("options", [{"vocab_size": 1}, {"num_samples": 0}, {"seq_len": 1}, {"micro_batch_size": 0}])
def test_bad_sizes_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        module(**options)
