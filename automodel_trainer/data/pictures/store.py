"""Samples with pictures: their planned tokens on disk, and where their pictures are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image

from automodel_trainer.data.pictures.files import Pictures
from automodel_trainer.data.rows import RowStats, SampleRows, TokenStore, integers


class Picture(NamedTuple):
    """A picture of a sample: how it is read, from where, and what a message calls its sample."""

    reader: Pictures
    source: Any
    place: str

    def read(self) -> Image.Image:
        """The picture, upright, in RGB.

        Raises:
            ValueError: it cannot be read; the sample is named.
        """
        try:
            return self.reader.read(self.source)
        except ValueError as error:
            raise ValueError(f"{self.place}: {error}") from error


class PictureDocument(NamedTuple):
    """A `Document` with pictures.

    Attributes:
        input_ids, trained, sample_id: as of `Document`.
        text: what the processor is given.
        pictures: of the sample, in order. They are not read yet.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    sample_id: int
    text: str
    pictures: Sequence[Picture]


class PictureStore(TokenStore):
    """Random access to planned samples.

    Args:
        dataset: as of `TokenStore`, and with the columns `text`, `pictures` (their number) and
            `picture_tokens`.
        pictures_of: the pictures of a row of the data, by its number.

    Attributes:
        pictures: pictures per sample, int64 `[n]`.
        picture_tokens: tokens per sample that stand for pictures, int64 `[n]`.
    """

    def __init__(self, dataset: Dataset, pictures_of: Callable[[int], list[Picture]]) -> None:
        super().__init__(dataset)
        self.pictures = integers(dataset, "pictures")
        self.picture_tokens = integers(dataset, "picture_tokens")
        self._texts = dataset.select_columns(["text"])
        self._pictures_of = pictures_of

    def pictures_of(self, sample_id: int) -> list[Image.Image]:
        """The pictures of a row of the data, read now."""
        return [picture.read() for picture in self._pictures_of(sample_id)]

    def fetch(self, indices: Sequence[int]) -> list[Any]:
        """The documents with these indices, in this order. Those without pictures are plain `Document`s."""
        documents: list[Any] = list(super().fetch(indices))
        for place, index in enumerate(indices):
            if self.pictures[index]:
                found = documents[place]
                pictures = self._pictures_of(found.sample_id)
                documents[place] = PictureDocument(
                    found.input_ids, found.trained, found.sample_id, self._texts[int(index)]["text"], pictures
                )
        return documents


class PictureRows(SampleRows):
    """Rows of whole samples, some with pictures.

    Args:
        store: the planned samples.
        groups, width, stats, fingerprint: as of `SampleRows`.

    Attributes:
        picture_tokens: tokens per row that stand for pictures, int64 `[len(self)]`.
        pictures_of: see `PictureStore`.
    """

    def __init__(
        self, store: PictureStore, groups: Iterable[np.ndarray], width: int, stats: RowStats, fingerprint: str
    ) -> None:
        super().__init__(store, groups, width, stats, fingerprint)
        self.picture_tokens = np.add.reduceat(store.picture_tokens[self._members], self._bounds[:-1])
        self.pictures_of = store.pictures_of
