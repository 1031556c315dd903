"""Values as JSON in a column of a `datasets.Dataset`, exactly as they were written.

`datasets` reads its feature `Json` with a fast parser that changes numbers: 1/3 comes back as 0.33333333333333304, NaN
as None, and an integer of more than 64 bits not at all. Such a number may be the argument of a tool call.
"""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features

from automodel_trainer.data.documents import half_a_character


class Json(datasets.Json):
    """`datasets.Json`, read by Python's own parser. It has the same name, so data has the same fingerprint."""

    def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
        """The value of a cell."""
        return None if example_data is None else json.loads(example_data)


def exactly(rows: Dataset) -> Dataset:
    """The same rows; columns of `datasets.Json` are read exactly."""
    if not _has_json(rows.features):
        return rows
    return read_as(rows, Features({name: _exact(feature) for name, feature in rows.features.items()}))


def read_as(rows: Dataset, features: Features) -> Dataset:
    """The same rows, read as other features that are stored alike. Unlike `Dataset.cast`, it copies nothing."""
    as_it_is = {key: rows.format[key] for key in ("type", "columns")}
    copied = rows.with_format(**as_it_is, **rows.format["format_kwargs"])
    copied.info.features = features
    return copied


def _has_json(feature: Any) -> bool:
    """Whether a feature is, or holds, one that `datasets` reads."""
    if isinstance(feature, dict):
        return any(map(_has_json, feature.values()))
    return type(feature) is datasets.Json or (hasattr(feature, "feature") and _has_json(feature.feature))


def _exact(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _exact(part) for name, part in feature.items()}
    if isinstance(feature, datasets.Json):
        return Json(decode=feature.decode)
    if isinstance(feature, datasets.List):
        return datasets.List(_exact(feature.feature), length=feature.length)
    return datasets.LargeList(_exact(feature.feature)) if isinstance(feature, datasets.LargeList) else feature


def json_column(values: Sequence[Any]) -> pa.Array:
    """Values as an Arrow array of JSON.

    Raises:
        ValueError: a value is none of JSON's, or a text that UTF-8 cannot hold. The message says which.
    """
    texts = [None if v is None else json.dumps(v, ensure_ascii=False, default=_plain) for v in values]
    return pa.ExtensionArray.from_storage(pa.json_(), text_column(texts))


def text_column(texts: Sequence[str | None]) -> pa.Array:
    """Texts as an Arrow array.

    Raises:
        ValueError: UTF-8 cannot hold one of them.
    """
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError as error:
        raise ValueError(half_a_character(error)) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    raise ValueError(
        f"a value is a {type(value).__name__}: {str(value)[:60]!r}. Allowed are those of JSON: texts, numbers, true, "
        "false, null, lists and objects."
    )
