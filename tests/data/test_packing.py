from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_trainer.data.batches import Document, collate_packed, collate_padded, padded_width
from automodel_trainer.data.packing import epoch_order, pack
from automodel_trainer.nn.constants import IGNORE_INDEX
from tests.harness import close
from tests.tiny import tiny_model


def document(length: int, sample_id: int, seed: int = 0) -> Document:
    generator = np.random.default_rng([seed, sample_id])
    return Document(generator.integers(1, 250, length), generator.random(length) < 0.6, sample_id)


def supervised_pairs(batch: dict) -> Counter:
    """Every (token that is read, label that is learned from it), as a causal model shifts them."""
    labels, tokens = batch["labels"][:, 1:], batch["input_ids"][:, :-1]
    kept = labels != IGNORE_INDEX
    return Counter(zip(tokens[kept].tolist(), labels[kept].tolist()))


@settings(max_examples=60)
@given(st.lists(st.integers(1, 64), max_size=80))
def test_every_sample_is_in_one_row_and_no_row_overflows(lengths: list[int]) -> None:
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 64 for row in rows)


@given(st.lists(st.integers(1, 20), max_size=40))
def test_no_sample_of_a_later_row_fits_into_an_earlier_one(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    for position, row in enumerate(rows):
        room = 20 - sum(lengths[i] for i in row)
        assert all(lengths[i] > room for later in rows[position + 1 :] for i in later)


def test_fuller_than_first_fit_where_rows_hold_few_samples() -> None:
    lengths = np.random.default_rng(0).normal(77, 12, 3400).astype(int).clip(53, 168)
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):  # first-fit decreasing
        index = next((i for i, used in enumerate(rows) if used + length <= 512), None)
        if index is None:
            rows.append(int(length))
        else:
            rows[index] += length
    ours = lengths.sum() / (len(pack(lengths, 512)) * 512)
    assert ours > 0.98
    assert ours > lengths.sum() / (len(rows) * 512)


def test_long_rows_of_many_samples_are_full() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 30_000)
    assert len(pack(lengths, 131_072)) == -(-int(lengths.sum()) // 131_072)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_of_short_samples_are_98_percent_full(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(40, 301, 3000)
    rows = pack(lengths, 1024)
    assert lengths.sum() / (len(rows) * 1024) >= 0.98


def test_packing_scales_to_many_samples() -> None:
    lengths = np.random.default_rng(0).integers(5, 2049, 50_000)
    rows = pack(lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) >= 0.98


def test_packed_rows_restart_positions_and_never_train_across_a_boundary() -> None:
    rows = [[document(5, 0), document(3, 1)], [document(10, 2)], []]
    batch = collate_packed(rows, 10, pad_id=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1], list(range(10)), list(range(10))]
    assert "attention_mask" not in batch
    assert (batch["labels"][batch["position_ids"] == 0] == IGNORE_INDEX).all()
    assert (batch["labels"][0, 8:] == IGNORE_INDEX).all()
    assert (batch["labels"][2] == IGNORE_INDEX).all()
    assert batch["sample_ids"] == [0, 1, 2]
    trained = batch["labels"] != IGNORE_INDEX
    assert (batch["labels"][trained] == batch["input_ids"][trained]).all()
    assert trained[1].tolist() == [False, *document(10, 2).trained[1:].tolist()]


def test_padded_rows_are_masked_at_their_end_and_a_filler_attends_to_something() -> None:
    batch = collate_padded([[document(5, 0)], [document(8, 1)], []], 8, pad_id=0)
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 8, 1]
    assert batch["attention_mask"][0].tolist() == [1] * 5 + [0] * 3
    assert (batch["labels"][2] == IGNORE_INDEX).all()
    assert (batch["labels"][0, 5:] == IGNORE_INDEX).all()
    assert batch["position_ids"][0].tolist() == list(range(8))


def test_padded_width() -> None:
    assert [padded_width(n, 100) for n in (1, 8, 9, 96, 97)] == [8, 8, 16, 96, 100]


def test_packed_and_padded_supervise_the_same_tokens() -> None:
    documents = [document(length, i) for i, length in enumerate([30, 7, 12, 25, 1, 9, 40])]
    groups = pack([len(d.input_ids) for d in documents], 40)
    packed = collate_packed([[documents[i] for i in group] for group in groups], 40, pad_id=0)
    padded = collate_padded([[d] for d in documents], 40, pad_id=0)
    assert supervised_pairs(packed) == supervised_pairs(padded)
    assert supervised_pairs(packed).total() == sum(int(d.trained[1:].sum()) for d in documents)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_row_has_the_losses_of_its_documents_alone(attention: str) -> None:
    model = tiny_model(attn_implementation=attention).eval()
    documents = [document(length, i) for i, length in enumerate([17, 30, 9])]

    def losses(batch: dict) -> torch.Tensor:
        with torch.no_grad():
            inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask") if key in batch}
            logits = model(**inputs, use_cache=False).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORE_INDEX
        )

    row = losses(collate_packed([documents], 64, pad_id=0))[0]
    padded = losses(collate_padded([[d] for d in documents], 32, pad_id=0))
    starts = np.cumsum([0, 17, 30])
    for index, (start, one) in enumerate(zip(starts.tolist(), documents)):
        alone = losses(collate_packed([[one]], len(one.input_ids), pad_id=0)).sum()
        within = row[start : start + len(one.input_ids) - 1].sum()
        assert alone > 0
        close(within, alone)
        close(padded[index].sum(), alone)
    close(row.sum(), padded.sum())


def test_filler_rows_have_finite_logits() -> None:
    model = tiny_model().eval()
    for batch in (collate_packed([[], [document(8, 0)]], 16, pad_id=0), collate_padded([[], [document(8, 0)]], 16, 0)):
        with torch.no_grad():
            logits = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                attention_mask=batch.get("attention_mask"),
                use_cache=False,
            ).logits
        assert torch.isfinite(logits).all()


def test_the_order_is_a_permutation_of_seed_and_epoch() -> None:
    lengths = np.full(50, 8)
    orders = [epoch_order(lengths, 4, seed=s, epoch=e).tolist() for s in (0, 1) for e in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[1] == epoch_order(lengths, 16, seed=0, epoch=1).tolist()
    assert epoch_order(lengths, 4, seed=0, epoch=3, shuffle=False).tolist() == list(range(50))


def test_length_groups_waste_little_and_are_still_shuffled() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 1003)
    order = epoch_order(lengths, 8, seed=0, epoch=0, grouped=True)
    assert sorted(order.tolist()) == list(range(1003))

    def used(rows: np.ndarray) -> float:
        batches = lengths[rows[:1000]].reshape(-1, 8)
        return batches.sum() / (batches.max(axis=1) * 8).sum()

    assert used(order) > 0.9 > 0.7 > used(epoch_order(lengths, 8, seed=0, epoch=0))
    longest = lengths[order[:1000]].reshape(-1, 8).max(axis=1)
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.3
    assert order.tolist() != epoch_order(lengths, 8, seed=0, epoch=1, grouped=True).tolist()
