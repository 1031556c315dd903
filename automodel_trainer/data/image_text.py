"""ImageTextDataModule: conversations with pictures, for vision-language models."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from datasets import Dataset, Value
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from PIL import Image as PILImage

from automodel_trainer.data.batches import MicroBatch
from automodel_trainer.data.built_in_templates import set_template
from automodel_trainer.data.chat import ChatDataModule
from automodel_trainer.data.formats import (
    PICTURE_COLUMNS,
    VIDEO_COLUMNS,
    Conversation,
    format_of,
    refuse_unwanted_answers,
)
from automodel_trainer.data.messages import is_empty_turn
from automodel_trainer.data.packing import pack
from automodel_trainer.data.pictures.collate import PictureCollate
from automodel_trainer.data.pictures.encode import BLANK, How, PictureEncoder, Shown
from automodel_trainer.data.pictures.files import Pictures
from automodel_trainer.data.pictures.given import has_pictures, refuse_unread_pictures, serializable, undecoded
from automodel_trainer.data.pictures.rows import Clip, RowReader, as_text
from automodel_trainer.data.pictures.store import Film, Picture, PictureDocument, PictureRows, PictureStore
from automodel_trainer.data.pictures.videos import Footage, VideoPart, Videos
from automodel_trainer.data.rows import Rows, TokenStore, digest
from automodel_trainer.data.sources import (
    describe_place,
    file_of,
    load_rows,
    load_validation_rows,
    places_of,
    refuse_other_columns,
)
from automodel_trainer.data.tokens import tokenize


class ImageTextDataModule(ChatDataModule):
    """Conversations with pictures, for supervised fine-tuning of vision-language models.

    Rows are those of `ChatDataModule` with pictures: parts of a message (`{"type": "image", …}`, OpenAI's
    `image_url`), or a column `images` or `image` with `<image>` in the text (LLaVA, TRL). A video is the list of its
    frames, or a file. Rows without pictures may stand beside them. Samples are planned from the headers of their
    pictures and videos, which are decoded in the loader's workers, and never cached. Only text of the assistant is
    trained. It takes the arguments of `ChatDataModule` and:

    Args:
        processor: a processor or the path of one. None: the model's, set by the Trainer.
        image_root: the folder that paths of pictures are relative to and must not leave. None: the folder of the file
            that a row is in. Of a list, the first is the one that paths are relative to; links may lead to all.
        image_mark: the text that stands for a picture of the column.
        min_pixels, max_pixels: scale pictures, and frames of videos, to so many pixels at least and at most, before
            the processor does what its own settings say. None: no limit.
        videos: how videos are shown: by the "processor", which has a part for them; as "pictures", one for each frame;
            "auto" does the former where it can. Files are shown by the processor alone.
        video_fps: frames per second of lists of frames that do not say theirs (`fps` of their part), and how many
            frames of each second of a file are shown. None: what the processor says.
        overlong: what to do with samples longer than `seq_len`: "drop" them, or stop with an "error". They are
            reported in either case, and never cut: a picture cannot be.

    Raises:
        ValueError: as `ChatDataModule`; or a picture cannot be read, or a row's marks and pictures differ in number.
    """

    rows_class: ClassVar[Any] = PictureRows

    def __init__(
        self,
        train: str | Any,
        validation: str | Any | None = None,
        *,
        processor: str | Any | None = None,
        image_root: list[str] | str | os.PathLike[str] | None = None,
        image_mark: str = "<image>",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        videos: How = "auto",
        video_fps: float | None = None,
        overlong: Literal["drop", "error"] = "drop",
        **kwargs: Any,
    ) -> None:
        if videos not in get_args(How):
            raise ValueError(f"videos={videos!r}. Allowed: {', '.join(map(repr, get_args(How)))}.")
        if video_fps is not None and not 0 < video_fps < float("inf"):
            raise ValueError(f"video_fps={video_fps} must be a number of frames per second, above 0.")
        if overlong not in ("drop", "error"):
            raise ValueError(f"overlong={overlong!r}: a sample with pictures is not cut. Allowed: 'drop', 'error'.")
        if kwargs.get("tokenizer") is not None:
            raise ValueError("ImageTextDataModule takes a processor=, which has the tokenizer, and no tokenizer=.")
        if not image_mark:
            raise ValueError("image_mark is empty: give the text that stands for a picture, such as '<image>'.")
        for name, pixels in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if pixels is not None and pixels < 1:
                raise ValueError(f"{name}={pixels} must be at least 1.")
        if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
            raise ValueError(f"min_pixels={min_pixels} must not be more than max_pixels={max_pixels}.")
        given = [image_root] if isinstance(image_root, str | os.PathLike) else image_root or []
        roots = [Path(root).expanduser() for root in given]
        if (missing := next((root for root in roots if not root.is_dir()), None)) is not None:
            raise ValueError(f"image_root={str(missing)!r} is no folder.")
        super().__init__(train, validation, overlong=overlong, **kwargs)
        self.processor: Any = processor
        self.image_root, self.more_roots = roots[0] if roots else None, tuple(roots[1:])
        self.image_mark = image_mark
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.videos: How = videos
        self.video_fps = video_fps
        self._stores: list[PictureStore] = []  # of every source and split
        self._stacked: int | None = None  # frames of every video, of a processor that stacks them
        self._has_films = False  # rows have videos that reach the model beside pictures
        self._crossed: str | None = None  # the model's input for cross-attention, once samples were made
        self.rope_index: Callable[[Mapping[str, Any]], Any] | None = None

    def resized(self, max_pixels: int) -> ImageTextDataModule:
        """A copy that prepares its data anew, with pictures of at most `max_pixels`."""
        other = copy.copy(self)
        for name in ("encoder", "blank", "_blank_clip"):
            other.__dict__.pop(name, None)
        other.rows, other._prepared = {}, False
        other.max_pixels = min(max_pixels, self.max_pixels or max_pixels)
        other.min_pixels = None if self.min_pixels is None else min(self.min_pixels, other.max_pixels)
        return other

    # --- the processor --------------------------------------------------------------------------------------------

    def load_processor(self) -> Any:
        """The processor, loaded first if a path was given, with `chat_template` if one was.

        Raises:
            ValueError: there is no processor, or no such template.
        """
        if isinstance(self.processor, str | os.PathLike):
            from transformers import AutoProcessor

            self.processor = AutoProcessor.from_pretrained(self.processor)
        if self.processor is None:
            raise ValueError(
                "ImageTextDataModule has no processor: pass `processor=`, or use the data module with a Trainer and a "
                "vision-language model that has one."
            )
        if self.chat_template is not None:
            set_template(self.processor.tokenizer, self.chat_template)
            self.processor.chat_template = self.processor.tokenizer.chat_template
        return self.processor

    def load_tokenizer(self) -> Any:
        """The processor's tokenizer.

        Raises:
            ValueError: there is no processor.
        """
        self.tokenizer = self.load_processor().tokenizer
        return self.tokenizer

    @cached_property
    def encoder(self) -> PictureEncoder:
        """Plans samples with the processor."""
        return PictureEncoder(self.load_processor(), self.loss_on, self.videos)

    @cached_property
    def blank(self) -> PictureDocument:
        """A document with a small blank picture and nothing to train."""
        picture = Picture(Pictures(), PILImage.new("RGB", self.encoder.blank), "the blank picture")
        return self._blank_of("image", self.encoder.blank, picture)

    @cached_property
    def _blank_clip(self) -> PictureDocument:
        """A document with a small blank video and nothing to train."""
        part, count = self.encoder.videos, self._stacked or 2
        assert part is not None, "rows have such videos"
        footage = Footage((BLANK, BLANK), tuple(range(count)), count, 1.0)
        frames = [PILImage.fromarray(frame) for frame in footage.blank()]
        film = Film(Videos(Pictures(), part), Clip(frames, footage.fps), "the blank video")
        return self._blank_of("video", footage, film)

    def _blank_of(self, kind: str, shown: Shown, item: Picture | Film) -> PictureDocument:
        parts = [{"type": kind}, {"type": "text", "text": "."}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]
        planned = self.encoder.plan(Conversation(messages), [shown])
        ids = np.array(planned.encoded.input_ids)
        return PictureDocument(ids, np.zeros(len(ids), bool), -1, planned.text, [item])

    def _blanks(self) -> dict[str, PictureDocument]:
        """The blank document of each kind that the data have."""
        return {"picture": self.blank} | ({"video": self._blank_clip} if self._has_films else {})

    def picture_probe(self) -> MicroBatch:
        """A micro-batch with one small blank picture, and all of its text trained."""
        document = self.blank._replace(trained=np.ones(len(self.blank.input_ids), bool))
        return self._collate()([[document]], len(document.input_ids), self.pad_id())

    def check_pictures(self) -> None:
        """Read every picture and video of all splits, as training would. It takes as long as an epoch of loading.

        Raises:
            ValueError: some cannot be read. The message names their rows, at most 20.
        """
        self.prepare()
        faults = [fault for store in self._stores for fault in store.faults()]
        if faults:
            shown = "\n".join([*faults[:20], *(["…"] if len(faults) > 20 else [])])
            raise ValueError(f"the pictures of {len(faults):,} rows cannot be read:\n{shown}")
        rank_zero_info(
            f"All {sum(int(store.pictures.sum()) for store in self._stores):,} pictures and videos are read."
        )

    # --- rows -----------------------------------------------------------------------------------------------------

    def build_rows(self) -> dict[str, Rows]:
        """See `ChatDataModule.build_rows`."""
        self._stores = []
        return super().build_rows()

    def read(self, data: Any, split: str) -> Dataset:
        """The rows of one split, with pictures as files or bytes. See `load_rows`."""
        return undecoded(load_rows(serializable(data), split))

    def _validation_rows(self, train: Any) -> Dataset | None:
        if self.validation is not None:
            return super()._validation_rows(train)
        found = load_validation_rows(serializable(train))
        return None if found is None else undecoded(found)

    def _samples(self, rows: Dataset) -> tuple[TokenStore, str]:
        """All rows as planned samples, and their fingerprint."""
        form = format_of(rows, self.columns)
        refuse_other_columns(rows, form.data_columns)
        refuse_unwanted_answers(rows, form)
        visual = form.visual_columns((*PICTURE_COLUMNS, *VIDEO_COLUMNS))
        unread = self._name_unread(rows, form.name, {*form.columns_read.values(), *visual})
        self.load_tokenizer()
        encoder = self.encoder
        source = _Source(
            rows.with_format(None),
            RowReader(form, self.image_mark, films=encoder.videos is not None),
            places_of(rows),
            self.image_root or (Path("/") if has_pictures(rows.features) else None),
            self.more_roots,
            self.min_pixels,
            self.max_pixels,
            encoder.videos,
            self.video_fps,
        )

        def encode_batch(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            made: dict[str, list[Any]] = {"input_ids": [], "trained": [], "text": [], "empty_turns": []}
            made |= {name: [] for name in _OF_PICTURES}
            for position, index in enumerate(indices):
                row = {name: values[position] for name, values in batch.items()}
                try:
                    conversation, sources = source.reader.read(row)
                    shown = [source.look(index, item) for item in sources]
                    counts = _counts(shown, encoder.videos)
                    planned = encoder.plan(conversation, shown)
                except ValueError as error:
                    raise ValueError(f"{source.place(index)}: {error}") from error
                made["input_ids"].append(planned.encoded.input_ids)
                made["trained"].append(planned.encoded.trained)
                made["text"].append(planned.text if sources else "")
                made["picture_tokens"].append(planned.picture_tokens)
                for name, count in counts.items():
                    made[name].append(count)
                made["empty_turns"].append(sum(map(is_empty_turn, conversation.messages)))
            return {**made, "sample_id": indices}

        settings = {
            "kind": "image-text",
            # 1 wrote parts of text for templates that take text alone; 2 counted no tokens of pictures; 3 saw no
            # videos; 4 knew no processor's part for videos; 5 counted no empty turns, and read parts less strictly
            "version": 6,
            "loss_on": self.loss_on,
            "columns": self.columns,
            "mark": self.image_mark,
            "pixels": [self.min_pixels, self.max_pixels],
            "processor": _content(self.load_processor()),
            "videos": None if encoder.videos is None else [self.video_fps, encoder.videos.settings()],
        }
        samples, key = tokenize(
            rows,
            encode_batch,
            tokenizer=encoder.tokenizer,
            settings=settings,
            masked=True,
            cache=self.cache,
            where={"folders": source.folders()},
            more={"text": Value("string"), **dict.fromkeys(_OF_PICTURES, Value("int64"))},
        )
        store = PictureStore(samples, source.of)
        self._stores.append(store)
        if not store.pictures.any():
            refuse_unread_pictures(rows, unread)
        self._choose_blanks(store)
        self._check(store)
        self._report_turns(store, rows)
        self._check_plan(store)
        return store, digest(key, store.lengths.tolist(), store.picture_tokens.tolist())

    def _choose_blanks(self, store: PictureStore) -> None:
        """A processor that does not resize wants pictures of one size: blank ones have that of the data.

        Raises:
            ValueError: the processor stacks videos, and these differ in their number of frames.
        """
        resizes = getattr(self.load_processor().image_processor, "do_resize", True)
        stills = np.flatnonzero(store.pictures > store.films)
        if not resizes and len(stills):
            items = store.fetch([int(stills[0])])[0].pictures
            picture = next(item for item in items if isinstance(item, Picture))
            self.encoder.blank = picture.reader.size(picture.source)
        part, frames = self.encoder.videos, np.unique(store.frames[store.frames > 0])
        if part is None or not len(frames):
            return
        if (silent := store.timeless) and part.reads_times:
            rank_zero_warn(
                f"{silent:,} videos do not say their frames per second, so {type(self.load_processor()).__name__} "
                "guesses the times of their frames (24 a second). Give `fps` in their parts, or video_fps=."
            )
        if part.same_length:
            self._stacked = int(frames[0]) if self._stacked is None else self._stacked
            _refuse_lengths(part, {self._stacked, *frames.tolist()})
        self._has_films = self._has_films or bool(store.films.any())

    def _check_plan(self, store: PictureStore) -> None:
        """Make the tensors of a few samples, so that a plan that does not hold is known before training.

        Raises:
            ValueError: as `PictureCollate`.
        """
        collate = self._collate()
        for count in np.unique(store.pictures)[:4]:
            index = int(np.flatnonzero(store.pictures == count)[0])
            if count:
                collate([store.fetch([index])], int(store.lengths[index]), self.pad_id())
                self._crossed = self.encoder.crossing

    def setup(self, stage: str | None = None) -> None:
        """See `MicroBatchDataModule.setup`.

        Raises:
            ValueError: as there; or rows without pictures would share a micro-batch with some, and see them.
        """
        super().setup(stage)
        if self._crossed is None or (self.micro_batch_size == 1 and self.dp_size == 1):
            return
        for split, rows in self.rows.items():
            tokens = getattr(rows, "picture_tokens", None)
            pictured = None if tokens is None else tokens > 0
            if pictured is not None and pictured.any() and not pictured.all():
                raise ValueError(
                    f"{split}: {int((~pictured).sum()):,} of {len(pictured):,} rows have no pictures, and this model "
                    f"sees pictures by cross-attention ({self._crossed}): beside rows with pictures, others are not "
                    "what they are alone. Train rows with pictures only, or micro_batch_size=1 on one device."
                )

    def group(self, store: TokenStore, kept: np.ndarray) -> list[list[int]]:
        """Which samples share a row. Where some rows have no picture, each has room for the blank one."""
        assert isinstance(store, PictureStore)
        groups = super().group(store, kept)
        has = {"picture": store.pictures > store.films, "video": store.films > 0}
        needed = 0
        for kind, blank in self._blanks().items():
            found = [bool(has[kind][kept[group]].any()) for group in groups]
            needed += 0 if all(found) or not any(found) else len(blank.input_ids)
        if not needed:
            return groups
        lengths, room = store.lengths[kept], self.seq_len - needed
        if room < self.seq_len // 2:  # it would cost too much: a rank without pictures takes a row more instead
            return groups
        fits = np.flatnonzero(lengths <= room)
        longer = [[int(index)] for index in np.flatnonzero(lengths > room)]
        return longer + [fits[group].tolist() for group in pack(lengths[fits], room)]

    def sample_prompts(self, count: int) -> list[str]:
        """At most `count` prompts to try a model on: first user turns of rows without pictures."""
        rows = self.prompt_rows()
        films = self.encoder.videos is not None
        reader, found = RowReader(format_of(rows, self.columns), self.image_mark, films=films), []
        for index in range(min(len(rows), 100 * count)):
            conversation, sources = reader.read(rows[index])
            turns = [m["content"] for m in as_text(conversation.messages) if m["role"] == "user"] if not sources else []
            found += turns[:1]
            if len(found) == count:
                break
        return found

    def _layout(self) -> dict[str, Any]:
        strategy: Any = getattr(self.trainer, "strategy", None)
        always = bool(getattr(strategy, "needs_every_gradient", False))
        return {**super()._layout(), "collate": self._collate(), "always_pictures": always}

    def _collate(self) -> PictureCollate:
        return PictureCollate(self.encoder, self.rope_index, self.packs, self._blanks(), self.positions)


@dataclass
class _Source:
    """Where the pictures of rows are.

    Attributes:
        rows: the data.
        reader: finds the pictures of a row.
        places: where each file begins in the rows; None: they come from no file.
        root: the folder of all pictures; None: that of the file of a row.
        more_roots: see `Pictures`.
        min_pixels, max_pixels: see `Pictures`.
        videos: the processor's part for videos; None: their frames become pictures.
        video_fps: see `Videos`.
    """

    rows: Dataset
    reader: RowReader
    places: Sequence[tuple[int, str]] | None
    root: Path | None
    more_roots: tuple[Path, ...]
    min_pixels: int | None
    max_pixels: int | None
    videos: VideoPart | None
    video_fps: float | None

    def place(self, index: int) -> str:
        """Where a row came from, for messages."""
        return describe_place(self.places, index)

    def pictures(self, index: int) -> Pictures:
        """How the pictures of a row are read."""
        root = self.root
        if root is None and self.places:
            root = Path(file_of(self.places, index)[1]).parent
        return Pictures(root, self.min_pixels, self.max_pixels, self.more_roots)

    def folders(self) -> list[str]:
        """The folders that paths of pictures are relative to."""
        if self.root is not None or not self.places:
            return [str(self.root)]
        return sorted({os.path.dirname(os.path.abspath(path)) for _, path in self.places})

    def look(self, index: int, item: Any) -> Shown:
        """What is known of a picture or a video of a row from its headers."""
        pictures = self.pictures(index)
        return self.films(pictures).look(item) if isinstance(item, Clip) else pictures.size(item)

    def films(self, pictures: Pictures) -> Videos:
        """How the videos of a row are read."""
        assert self.videos is not None, "else frames are pictures"
        return Videos(pictures, self.videos, self.video_fps)

    def of(self, index: int) -> list[Picture | Film]:
        """The pictures and videos of a row, which are not read yet."""
        pictures, place = self.pictures(index), self.place(index)
        return [
            Film(self.films(pictures), item, place) if isinstance(item, Clip) else Picture(pictures, item, place)
            for item in self.reader.read(self.rows[index]).sources
        ]


_OF_PICTURES = ("picture_tokens", "pictures", "films", "frames", "timeless")


def _counts(shown: Sequence[Shown], part: VideoPart | None) -> dict[str, int]:
    """Columns of a sample's pictures and videos; see `PictureStore`.

    Raises:
        ValueError: the processor stacks videos, and these differ in their number of frames.
    """
    frames = [len(item.taken) for item in shown if isinstance(item, Footage)]
    if part is not None and frames and part.same_length:
        _refuse_lengths(part, set(frames))
    timeless = sum(isinstance(item, Footage) and item.fps is None for item in shown)
    own = len(frames) if part is not None and frames and part.own_tensors else 0
    return {"pictures": len(shown), "films": own, "frames": max(frames, default=0), "timeless": timeless}


def _refuse_lengths(part: VideoPart, frames: set[int]) -> None:
    """Raise ValueError if videos that are stacked differ in their number of frames."""
    if len(frames) > 1:
        some = ", ".join(map(str, sorted(frames)[:4])) + (", …" if len(frames) > 4 else "")
        raise ValueError(
            f"{type(part.processor).__name__} stacks videos, so all must have the same number of frames, and these "
            f"have {some}. Give as many of each, or set videos='pictures': each frame becomes a picture."
        )


def _content(processor: Any) -> dict[str, Any]:
    """Everything that decides what a processor makes of a picture's size."""
    settings = processor.image_processor.to_dict()
    own = {k: v for k, v in vars(processor).items() if isinstance(v, str | int | float | bool | list | dict)}
    return json.loads(json.dumps({"class": type(processor).__name__, "pictures": settings, **own}, default=str))
