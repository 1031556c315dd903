"""From rows to tokenized samples: run an encoder over a data set on all cores, through the token cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from automodel_trainer.data.cache import cache_key, load_or_build
from automodel_trainer.data.encode_rows import Encoder, encode_rows, processes_for
from automodel_trainer.data.sources import fingerprint


def tokenize(
    rows: Dataset,
    encode: Encoder,
    *,
    tokenizer: Any,
    settings: dict[str, Any],
    masked: bool,
    cache: bool,
    more: dict[str, Any] | None = None,
    where: dict[str, Any] | None = None,
) -> tuple[Dataset, str]:
    """Encode all rows, or read the result from the cache.

    Args:
        rows: the data set.
        encode: the encoder.
        tokenizer: part of the cache's key.
        settings: every other value that the samples depend on; part of the key.
        masked: whether the samples have a `trained` column.
        cache: False keeps the samples in memory and uses no cache.
        more: the types of other columns that `encode` returns, as `datasets` has them.
        where: the folders of files that rows name. They are part of the cache's key, not of the fingerprint.

    Returns:
        The samples, at least one, and their fingerprint. The columns are `input_ids`, `length`, `sample_id` and, if
        masked, `trained` and `supervised` (the number of trained tokens without the first token).

    Raises:
        ValueError: no row has any text, or `encode` refuses a row.
    """
    content = fingerprint(rows)
    key = cache_key(content, tokenizer, settings)

    def build(scratch: Path | None) -> Dataset:
        def with_counts(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            return _with_counts(encode(batch, indices))

        features = Features({**_features(masked), **(more or {})})
        samples = encode_rows(rows, with_counts, features, scratch, processes_for(len(rows)))
        if len(samples) == 0:
            raise ValueError("no row of the data has any text. Check the data and the names of its columns.")
        return samples

    kept = key if where is None else cache_key(content, tokenizer, {**settings, **where})
    return (load_or_build(kept, build) if cache else build(None)), key


def split_ids(count: int, share: float, seed: int) -> np.ndarray:
    """Draw the row numbers to hold out for validation: at least one row, and never all.

    Args:
        count: number of rows.
        share: share of the rows to hold out, from 0 to 1.
        seed: determines the draw.

    Returns:
        Row numbers in ascending order, int64 `[n]`.

    Raises:
        ValueError: there are fewer than two rows.
    """
    if count < 2:
        raise ValueError(f"val_split={share} needs at least 2 rows, but the data has {count}.")
    take = min(max(1, round(count * share)), count - 1)
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[:take])


def check_share(share: float) -> None:
    """Check the range of `val_split`.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"val_split={share} must be a share of the rows: 0 <= val_split < 1.")


def check_columns(wanted: list[str], available: list[str]) -> None:
    """Check that all wanted columns exist.

    Raises:
        ValueError: a column does not exist. The message names the first one.
    """
    for name in wanted:
        if name not in available:
            raise ValueError(f"the data has no column {name!r}; its columns are {available}.")


def _with_counts(samples: dict[str, list[Any]]) -> dict[str, list[Any]]:
    counts = {"length": [len(ids) for ids in samples["input_ids"]]}
    if "trained" in samples:
        counts["supervised"] = [int(np.count_nonzero(trained[1:])) for trained in samples["trained"]]
    return {**samples, **counts}


def _features(masked: bool) -> Features:
    features = {"input_ids": List(Value("int32")), "sample_id": Value("int64"), "length": Value("int32")}
    mask = {"trained": List(Value("bool")), "supervised": Value("int32"), "empty_turns": Value("int32")}
    return Features({**features, **mask} if masked else features)
