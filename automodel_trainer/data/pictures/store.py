"""Samples with pictures: their planned tokens on disk, and where their pictures are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image

from automodel_trainer.data.pictures.files import Pictures
from automodel_trainer.data.pictures.rows import Clip
from automodel_trainer.data.pictures.videos import Footage, Videos
from automodel_trainer.data.rows import RowStats, SampleRows, TokenStore, integers

_AT_ONCE = 1000  # rows whose pictures are read before the next are asked for


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
        return _read(self)


class Film(NamedTuple):
    """A video of a sample: how it is read, from where, and what a message calls its sample."""

    reader: Videos
    source: Clip
    place: str

    def read(self) -> tuple[np.ndarray, Footage]:
        """The frames that the model sees, and what is known of the video.

        Raises:
            ValueError: it cannot be read; the sample is named.
        """
        return _read(self)


def _read(item: Picture | Film) -> Any:
    try:
        return item.reader.read(item.source)
    except ValueError as error:
        raise ValueError(f"{item.place}: {error}") from error


class PictureDocument(NamedTuple):
    """A `Document` with pictures or videos.

    Attributes:
        input_ids, trained, sample_id: as of `Document`.
        text: what the processor is given.
        pictures: and videos of the sample, in order. They are not read yet.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    sample_id: int
    text: str
    pictures: Sequence[Picture | Film]


class PictureStore(TokenStore):
    """Random access to planned samples.

    Args:
        dataset: as of `TokenStore`, and with the columns `text`, `pictures` (how many pictures and videos),
            `picture_tokens`, `films` (videos that reach the model beside pictures), `frames` (of each of its videos;
            0 if it has none) and `timeless` (videos that do not say their frames per second).
        pictures_of: the pictures and videos of a row of the data, by its number.

    Attributes:
        pictures: pictures and videos per sample, int64 `[n]`.
        picture_tokens: tokens per sample that stand for pictures and videos, int64 `[n]`.
        films: videos per sample that reach the model beside pictures, int64 `[n]`.
        frames: of each video of a sample, int64 `[n]`.
        timeless: videos of all samples that do not say their frames per second.
    """

    def __init__(self, dataset: Dataset, pictures_of: Callable[[int], list[Picture | Film]]) -> None:
        super().__init__(dataset)
        self.pictures = integers(dataset, "pictures")
        self.picture_tokens = integers(dataset, "picture_tokens")
        self.films, self.frames = integers(dataset, "films"), integers(dataset, "frames")
        self.timeless = int(integers(dataset, "timeless").sum())
        self._texts = dataset.select_columns(["text"])
        self._pictures_of = pictures_of

    def pictures_of(self, sample_id: int) -> list[Image.Image]:
        """The pictures of a row of the data, read now, and the first frame of each video."""
        shown = [item.read() for item in self._pictures_of(sample_id)]
        return [Image.fromarray(item[0][0]) if isinstance(item, tuple) else item for item in shown]

    def faults(self) -> Iterator[str]:
        """Read the pictures and videos of every sample. Yields a message for each sample that cannot be read."""
        rows = self.sample_ids[self.pictures > 0].tolist()
        with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock
            for start in range(0, len(rows), _AT_ONCE):
                yield from filter(None, pool.map(self._fault, rows[start : start + _AT_ONCE]))

    def _fault(self, row: int) -> str | None:
        try:
            for item in self._pictures_of(row):
                item.read()
        except ValueError as error:
            return str(error)
        return None

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
        picture_tokens: tokens per row that stand for pictures and videos, int64 `[len(self)]`.
        kinds: whether a row has any "picture", and any "video" that reaches the model beside pictures: each bool
            `[len(self)]`.
        pictures_of: see `PictureStore`.
    """

    def __init__(
        self, store: PictureStore, groups: Iterable[np.ndarray], width: int, stats: RowStats, fingerprint: str
    ) -> None:
        super().__init__(store, groups, width, stats, fingerprint)
        self.picture_tokens = self._sum(store.picture_tokens)
        films = self._sum(store.films)
        self.kinds = {"picture": self._sum(store.pictures) > films, "video": films > 0}
        self.pictures_of = store.pictures_of

    def _sum(self, of_samples: np.ndarray) -> np.ndarray:
        """A number of each sample, summed up in each row."""
        return np.add.reduceat(of_samples[self._members], self._bounds[:-1])
