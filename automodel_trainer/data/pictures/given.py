"""Rows with pictures as people give them: in memory, as a `datasets.Dataset`, or with pictures that nobody reads."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, IterableDatasetDict, Video
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image as PILImage

from automodel_trainer.data.exact_json import read_as
from automodel_trainer.data.pictures.files import as_png, is_picture
from automodel_trainer.data.pictures.rows import is_visual
from automodel_trainer.data.sources import keep_places, places_of

_IN_TEXT = re.compile(r"<img>[^<]{1,500}\.(?:png|jpe?g|webp|gif|bmp)\s*</img>", re.IGNORECASE)  # of old data sets


def serializable(data: Any) -> Any:
    """Rows in memory with pictures and bytes as data URLs: they are stored as JSON. Data sets stay as they are."""
    if isinstance(data, DatasetDict | IterableDatasetDict):  # they are dicts
        return data
    if isinstance(data, list | tuple):
        return [serializable(item) for item in data]
    if isinstance(data, dict):
        return {key: serializable(value) for key, value in data.items()}
    if isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 3 and data.shape[-1] in (3, 4):
        data = PILImage.fromarray(data)
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    if isinstance(data, PILImage.Image):
        return _data_url(as_png(data))
    return _data_url(data) if isinstance(data, bytes | bytearray | memoryview) else data


def undecoded(rows: Dataset) -> Dataset:
    """Rows whose columns of `datasets.Image` give files and bytes, not pictures. Those of `datasets.Video` do too."""
    if not has_pictures(rows.features):
        return rows
    features = Features({name: _as_bytes(kind) for name, kind in rows.features.items()})
    return keep_places(read_as(rows, features), rows)


def has_pictures(feature: Any) -> bool:
    """Whether a feature of a data set is or holds `datasets.Image` or `datasets.Video`."""
    return any(kind in repr(feature) for kind in ("Image(", "Video("))


def refuse_unread_pictures(rows: Dataset, unread: Sequence[str]) -> None:
    """Raise ValueError if rows without a picture have a column of pictures or videos under an unknown name."""
    some = rows.with_format(None).select(range(min(len(rows), 8)))
    for name in unread:
        values = [value for value in some[name] if value is not None]
        if values and all(map(is_visual, values)):
            raise ValueError(
                f"no row has a picture that is read, and the column {name!r} has some, such as "
                f"{str(values[0])[:80]!r}. Pictures stand in a column 'images' or 'image', or in parts of messages. "
                f'Map yours with columns={{"images": "{name}"}} (videos: {{"videos": "{name}"}}), rename it, or '
                "remove it to train on the text alone."
            )
    if named := next(filter(None, (_IN_TEXT.search(str(row)) for row in some)), None):
        raise ValueError(
            f"no row has a picture that is read, and a text names one: {named[0]!r}. Write <image> in its place, and "
            "the picture into a column 'images'."
        )
    for folder in {os.path.dirname(path) or "." for _, path in places_of(rows) or []}:
        if os.path.isdir(folder) and (names := sorted(filter(is_picture, os.listdir(folder)))):
            rank_zero_warn(
                f"no row of {folder} names a picture, and {len(names):,} pictures lie there ({names[0]}, …): the "
                "model is trained on text alone. Name the picture of each row in a column 'image', or several in "
                "'images'."
            )


def _as_bytes(feature: Any) -> Any:
    if isinstance(feature, Image) and feature.mode not in (None, "RGB", "RGBA"):
        raise ValueError(
            f"the data has pictures of datasets.Image(mode={feature.mode!r}), and the model is shown what the files "
            'hold, in RGB. Convert the pictures with .map(…), or cast the column to datasets.Image(mode="RGB").'
        )
    if isinstance(feature, Image | Video):
        return type(feature)(decode=False)
    if isinstance(feature, dict):
        return {name: _as_bytes(kind) for name, kind in feature.items()}
    if isinstance(feature, list):
        return [_as_bytes(kind) for kind in feature]
    if hasattr(feature, "feature") and has_pictures(feature):
        return type(feature)(_as_bytes(feature.feature))
    return feature


def _data_url(data: bytes | bytearray | memoryview) -> str:
    return f"data:image/any;base64,{base64.b64encode(data).decode()}"
