"""Find the pictures and videos of a row, and make its messages into parts of text and pictures.

A row has pictures in two ways, which may be mixed:

- in a message: a part `{"type": "image", "image" | "url" | "path" | "bytes" | "base64": …}`, OpenAI's
  `{"type": "image_url", "image_url": {"url": …}}`, or one without a type, `{"image": …}`;
- in a column `images` or `image`: one or several, which stand where the text has `<image>` or a message has a part
  `{"type": "image"}` without a picture. Without any such mark they come first in the first user's turn, as in TRL.

A video is the list of its frames or a file. It stands in a part `{"type": "video", "video": […]}`, or in a column
`videos` or `video`, as pictures do; its mark is `<video>`, where a row has such a column. It stays a video where the
processor has a part for videos; elsewhere each of its frames becomes a picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from automodel_trainer.data.formats import PICTURE_COLUMNS, VIDEO_COLUMNS, Conversation, Format
from automodel_trainer.data.messages import ROLES, Message
from automodel_trainer.data.pictures.files import is_picture, of_base64

_PICTURE, _VIDEO = "\ufdd0", "\ufdd2"  # characters that are none: one stands for each while messages are parsed
_SIGNS = re.compile(f"([{_PICTURE}{_VIDEO}])")
VIDEO_MARK = "<video>"
_KINDS = {
    "image": "image", "image_url": "image", "input_image": "image", "text": "text", "input_text": "text",
    "video": "video", "video_url": "video", "input_video": "video",
}  # fmt: skip
_SOURCES = {
    "image": ("image", "url", "path", "bytes", "base64", "data", "image_url", "source"),
    "video": ("video", "url", "path", "video_url"),
}
_RATES = ("fps", "sample_fps")
_BESIDE = ("type", "detail", *_RATES)  # keys of a part that are known, and show nothing
_RESIZING = (
    "resized_height", "resized_width", "min_pixels", "max_pixels", "total_pixels", "nframes", "min_frames",
    "max_frames", "video_start", "video_end",
)  # fmt: skip
_OTHER_MARKS = re.compile(r"<\|?image(?:here|_?placeholder|[ _-]?\d+)?\|?>|\[(?:img|image)\]", re.IGNORECASE)
_CONTENT = ("content", "value", "user", "assistant")
_FIRST_READ = ("system", "history")  # what stands before the columns that a format requires


class Clip(NamedTuple):
    """A video of a row.

    Attributes:
        source: its frames, or its file.
        fps: frames per second; None: the row does not say.
    """

    source: Any
    fps: float | None = None


class Pictured(NamedTuple):
    """One row: its messages, whose content is a list of parts, and the pictures in their order.

    Attributes:
        conversation: as of the row without pictures; content has parts `{"type": "image"}`, `{"type": "text"}` and,
            where videos stay videos, `{"type": "video"}`.
        sources: of the pictures and of the frames of videos; where videos stay videos, a `Clip` for each.
    """

    conversation: Conversation
    sources: list[Any]


class RowReader:
    """Reads rows with pictures.

    Args:
        form: the format of the rows.
        mark: the text that stands for a picture of the column.
        column: the column with pictures; None: `images` or `image`.
        films: videos stay videos; False: their frames become pictures.
    """

    def __init__(self, form: Format, mark: str = "<image>", column: str | None = None, *, films: bool = False) -> None:
        self.form, self.mark, self.films = form, mark, films
        self.columns = form.visual_columns(PICTURE_COLUMNS) if column is None else (column,)
        self.video_columns = form.visual_columns(VIDEO_COLUMNS)

    def read(self, row: Mapping[str, Any]) -> Pictured:
        """Convert a row.

        Raises:
            ValueError: it cannot be read, its marks and pictures differ in number, or a video cannot be shown.
        """
        pictures = _Visuals("picture", self.mark, _PICTURE, _listed(_only(row, self.columns)[1]))
        marks_videos = any(name in row for name in self.video_columns)  # else `<video>` is text like any other
        videos = _Visuals(
            "video", VIDEO_MARK if marks_videos else None, _VIDEO, _videos(row, self.form, self.video_columns)
        )
        found = {"image": pictures, "video": videos}
        marked = dict(row)
        read = self.form.columns_read
        for name in sorted(read, key=lambda name: name not in _FIRST_READ):  # as the messages will stand
            column = read[name]
            if column in row and name != "tools":
                value = row[column]
                if len(self.form.required) == 1 and name == self.form.required[0] and isinstance(value, str):
                    value = _from_json(value) or value  # a list of messages may be its JSON
                marked[column] = _marked(value, found)
        conversation = self.form.to_messages(marked)
        for visuals in (videos, pictures):  # the last one comes first in the turn
            conversation = visuals.with_unmarked(conversation)
        shown = {_PICTURE: iter(pictures.sources()), _VIDEO: self._shown_of(videos)}
        sources: list[Any] = []
        messages = [_in_parts(message, shown, sources) for message in conversation.messages]
        prompt_completion = None if sources else conversation.prompt_completion
        return Pictured(Conversation(messages, conversation.tools, prompt_completion), sources)

    def _shown_of(self, videos: _Visuals) -> Iterator[Any]:
        """What each video of a row shows: itself, or the list of its frames."""
        if self.films:
            return iter([Clip(source, rate) for source, rate in zip(videos.sources(), videos.rates)])
        return map(_frames, videos.sources())


@dataclass
class _Visuals:
    """The pictures or the videos of one row.

    Args:
        what: "picture" or "video", for messages.
        mark: the text that stands for the next one of the column; None: no text does.
        sign: the character that stands for one while messages are parsed.
        given: those of the column.

    Attributes:
        slots: of each place, what a message has there itself, or None for the next one of the column.
        rates: of each place, the frames per second that a message says.
    """

    what: str
    mark: str | None
    sign: str
    given: list[Any]
    slots: list[Any] = field(default_factory=list)
    rates: list[float | None] = field(default_factory=list)

    def marked(self, text: str) -> str:
        """A text with signs in place of marks."""
        if self.mark is None:
            return text
        for _ in range(text.count(self.mark)):
            self.add(None)
        return text.replace(self.mark, self.sign)

    def add(self, source: Any, rate: float | None = None) -> None:
        """Another place: what it shows, or None for the next one of the column."""
        self.slots.append(source)
        self.rates.append(rate)

    def check_next(self, index: Any) -> None:
        """Raise ValueError if a part gives the index of another one of the column than the next."""
        following = sum(slot is None for slot in self.slots)
        if isinstance(index, int) and index != following:
            raise ValueError(
                f"a part of a message says index {index}, and {self.what} {following} of the column comes next: each "
                f"is shown once, in the order of the column. Put the {self.what}s into the parts themselves."
            )

    def with_unmarked(self, conversation: Conversation) -> Conversation:
        """The conversation with signs for those of a column that nothing marks: first in the first user's turn."""
        if self.slots or not self.given:
            return conversation
        messages = list(conversation.messages)
        texts = (str(message.get("content") or "") for message in messages)
        if self.what == "picture" and (other := next(filter(None, map(_OTHER_MARKS.search, texts)), None)):
            raise ValueError(
                f"the row has pictures and no mark {self.mark!r} for them, and its text has {other[0]!r}, which looks "
                "like one. Write the mark in its place, or set image_mark=; without any mark pictures come first."
            )
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
        if first is None:
            raise ValueError(
                f"the row has {self.what}s, no mark for them, and no user's turn that they could stand in."
            )
        text = str(messages[first].get("content") or "")
        messages[first] = {**messages[first], "content": self.sign * len(self.given) + text}
        for _ in self.given:
            self.add(None)
        return Conversation(messages, conversation.tools)

    def sources(self) -> list[Any]:
        """What each place shows.

        Raises:
            ValueError: the column has more or fewer than its places.
        """
        wanted = sum(slot is None for slot in self.slots)
        if wanted != len(self.given):
            part = "image" if self.what == "picture" else self.what
            raise ValueError(
                f"the text has {wanted} mark(s) for {self.what}s ({self.mark or VIDEO_MARK} or a part of type {part}) "
                f"and the column has {len(self.given)} {self.what}(s). Give one {self.what} for each mark."
            )
        of_column = iter(self.given)
        return [next(of_column) if slot is None else slot for slot in self.slots]


def _only(row: Mapping[str, Any], columns: Iterable[str]) -> tuple[str, Any]:
    """The one of these columns that has a value, and its value; a list may be its JSON.

    Raises:
        ValueError: two have one.
    """
    values = {name: row.get(name) for name in columns}
    values = {name: (_from_json(value) or value) if isinstance(value, str) else value for name, value in values.items()}
    found = {k: v for k, v in values.items() if v is not None and v != "" and not (isinstance(v, list) and not v)}
    if len(found) > 1:
        one, other = list(found)[:2]
        raise ValueError(
            f"the row has a value in two columns, {one!r} and {other!r}, and one would be left out. Remove one, or say "
            f'which is meant: columns={{"{one}": "{other}"}}.'
        )
    return next(iter(found.items()), ("", None))


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _videos(row: Mapping[str, Any], form: Format, columns: Sequence[str]) -> list[Any]:
    """The videos of the column. `video` may be the frames of one, or its file."""
    name, value = _only(row, columns)
    several = VIDEO_COLUMNS[0]
    if (
        name == form.columns.get(several, several)
        or not isinstance(value, list | tuple)
        or isinstance(value[0], list | tuple)
        or is_film(value[0])
    ):
        return _listed(value)
    return [value]


def _frames(video: Any) -> list[Any]:
    """The frames of a video, as sources of pictures.

    Raises:
        ValueError: it is given as something else, such as a file.
    """
    if (frames := frames_of(video)) is not None:
        return frames
    raise ValueError(
        f"a video is given as {name_of(video)[:80]!r}, and each frame of a video becomes a picture here. {GIVE_FRAMES}"
    )


GIVE_FRAMES = (
    "Give the list of its frames: {'type': 'video', 'video': ['0001.png', …]}. "
    "`ffmpeg -i FILE -vf fps=1 FOLDER/%04d.png` writes one for each second."
)


def frames_of(video: Any) -> list[Any] | None:
    """The frames of a video, as sources of pictures; None if it is a file.

    Raises:
        ValueError: it has no frames, or one of them is a video.
    """
    if not isinstance(video, list | tuple):
        return None
    if not video:
        raise ValueError("a video has no frames. Give the list of them.")
    for frame in video:
        if is_film(frame):
            raise ValueError(f"a frame of a video is given as {name_of(frame)[:80]!r}, which is a video. {GIVE_FRAMES}")
    return list(video)


_FILES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ogv", ".wmv", ".flv")


def is_film(source: Any) -> bool:
    """Whether a source is the file of a video, by its name."""
    return name_of(source).lower().endswith(_FILES)


def is_visual(value: Any) -> bool:
    """Whether a value is a picture or the file of a video, or a list of such."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(is_visual, value))
    return is_film(value) or is_picture(value)


def name_of(source: Any) -> str:
    """What a message calls a frame or a video."""
    path = source.get("path") or source.get("url") if isinstance(source, dict) else source
    return path if isinstance(path, str) else f"a {type(source).__name__}"


def _marked(value: Any, found: Mapping[str, _Visuals]) -> Any:
    """A text, a message or a list of them, with a sign in place of each picture and video."""
    if isinstance(value, str):
        return _marked_text(value, found)
    if isinstance(value, list | tuple):
        return [_marked(item, found) for item in value]
    if not isinstance(value, dict):
        return value
    if kind := _part(value):
        return _marked_part(value, kind, found)
    if _is_result(value):
        return value
    return {key: _marked(item, found) if key in _CONTENT else item for key, item in value.items()}


def _marked_text(text: str, found: Mapping[str, _Visuals]) -> str:
    if reserved := _SIGNS.search(text):
        raise ValueError(f"the text holds the character {reserved[0]!r}, which Unicode reserves. Remove it.")
    for visuals in found.values():
        text = visuals.marked(text)
    return text


def _part(value: dict[str, Any]) -> str | None:
    """The type of a part of content, by its only key if it says none; None for a message."""
    if {"role", "from"} & value.keys():
        return None
    kind = value.get("type")
    if kind is None:
        keys = [key for key, item in value.items() if item is not None]
        return next((key for key in keys if key in _KINDS), None)
    return kind if isinstance(kind, str) and kind != "function" else None


def _is_result(message: dict[str, Any]) -> bool:
    """Whether a message has the structured result of a tool, which becomes JSON: no text, and no list of parts."""
    content = next((message[key] for key in _CONTENT if message.get(key) is not None), None)
    if ROLES.get(str(message.get("role") or message.get("from"))) != "tool" or isinstance(content, str | None):
        return False
    parts = content if isinstance(content, list) else [content]
    return not all(isinstance(part, str) or (isinstance(part, dict) and _part(part) in _KINDS) for part in parts)


def _marked_part(part: dict[str, Any], kind: str, found: Mapping[str, _Visuals]) -> dict[str, Any]:
    if kind not in _KINDS:
        raise ValueError(
            f"a message has a part of type {kind!r}, which is not supported. Allowed: {', '.join(sorted(_KINDS))}."
        )
    if _KINDS[kind] == "text":
        if part.get("text") is None:
            _refuse_other_text(part)
        return {"type": "text", "text": _marked_text(str(part.get("text") or ""), found)}
    visuals, keys = found[_KINDS[kind]], _SOURCES[_KINDS[kind]]
    source = _source(part, keys)
    if source is None:
        _refuse_other_source(part, kind, keys)
        visuals.check_next(part.get("index"))
    if unread := [key for key in _RESIZING if part.get(key) is not None]:
        raise ValueError(
            f"a part of type {kind!r} has {', '.join(unread)}, which is not read: the processor says how a "
            f"{visuals.what} is shown, and min_pixels=, max_pixels= and video_fps= of the data module. Remove it."
        )
    visuals.add(source, _rate(part))
    return {"type": "text", "text": visuals.sign}


def _source(part: dict[str, Any], keys: Iterable[str]) -> Any:
    """What a part shows; None if a column has it."""
    for key in keys:
        value = part.get(key)
        if isinstance(value, dict) and not (value.get("bytes") or value.get("path")):  # of OpenAI or Anthropic
            value = value.get("url") or value.get("data")
        if value is None or value == "" or (key == "source" and value is part[key]):
            continue
        if key == "base64" and isinstance(value, str):
            return of_base64(value, "a part's base64")
        return value
    return None


def _refuse_other_text(part: dict[str, Any]) -> None:
    """Raise ValueError if a part without text says something under another key."""
    if any(isinstance(value, str) and value.strip() for key, value in part.items() if key not in _BESIDE):
        raise ValueError(f"a part of a message is of type text and has no 'text'. Its keys are {list(part)}.")


def _refuse_other_source(part: dict[str, Any], kind: str, keys: Sequence[str]) -> None:
    """Raise ValueError if a part that stands for one of the column shows something else under an unknown key."""
    if other := [key for key, value in part.items() if is_visual(value)]:
        raise ValueError(
            f"a part of a message is of type {kind!r} and has what it shows under {other[0]!r}. Allowed: "
            f"{', '.join(keys)}; or none of them, for the next one of the column."
        )


def _rate(part: dict[str, Any]) -> float | None:
    """The frames per second that a part says.

    Raises:
        ValueError: it is no positive number.
    """
    value = next((part[key] for key in _RATES if part.get(key) is not None), None)
    if value is None:
        return None
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"a video has fps={value!r}. It must be a number of frames per second, above 0.")
    return float(value)


def _in_parts(message: Message, shown: Mapping[str, Iterator[Any]], sources: list[Any]) -> Message:
    """A message whose content is a list of parts. A message without content, such as a call, stays as it is.

    Args:
        shown: what each sign shows, from this message on; of a video all its frames, or the video.
        sources: what is shown is added to it, in order.
    """
    content = message.get("content")
    if not isinstance(content, str):
        return message
    if message["role"] == "assistant" and (sign := _SIGNS.search(content)):
        what = "picture" if sign[0] == _PICTURE else "video"
        raise ValueError(f"an assistant's turn has a {what}, and this model is trained to write text.")
    pieces: list[dict[str, Any]] = []
    for piece in _SIGNS.split(content):
        if piece in shown:
            found = next(shown[piece])
            several = found if piece == _VIDEO and not isinstance(found, Clip) else [found]
            sources += several
            pieces += [{"type": "video" if isinstance(found, Clip) else "image"} for _ in several]
        elif piece:
            pieces.append({"type": "text", "text": piece})
    return {**message, "content": pieces or [{"type": "text", "text": ""}]}


def as_text(messages: Iterable[Message]) -> list[Message]:
    """Messages whose parts of text are joined, for templates that take text alone."""
    return [
        {**m, "content": "".join(part["text"] for part in m["content"])} if isinstance(m.get("content"), list) else m
        for m in messages
    ]


def _from_json(value: str) -> Any:
    """The list or object that a text is the JSON of; None if it is none."""
    if value.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return None
