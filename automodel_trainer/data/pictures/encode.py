"""From a conversation with pictures to tokens: the ids that the model reads, and which of them are trained.

The processor's chat template is used unchanged, and so is its rule for what a picture becomes in the text. A blank
picture of the same size becomes the same tokens, so a sample is planned from the headers of its pictures, and with a
video of as many frames. The template writes one mark for each, and the processor puts many tokens in its place; spans
of characters move along.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from automodel_trainer.data.chat_template import Encoded, LossOn, all_but_bos, overlapping, special_tokens
from automodel_trainer.data.formats import Conversation
from automodel_trainer.data.messages import Message
from automodel_trainer.data.pictures.rows import as_text
from automodel_trainer.data.pictures.videos import Footage, VideoPart, obstacle
from automodel_trainer.data.rendered_chat import RenderedChat, Span, shortened
from automodel_trainer.data.turn_marks import TurnFinder

Size = tuple[int, int]
"""Width and height of a picture."""
Shown = Size | Footage
"""What is known of a picture or a video without its pixels."""
Seen = Image.Image | tuple[np.ndarray, Footage]
"""A picture, or the frames of a video and what is known of it."""
How = Literal["auto", "pictures", "processor"]
"""How videos are shown; see `ImageTextDataModule`."""
BLANK = 32
"""Pixels on each side of a blank picture."""
_OWN = ("input_ids", "attention_mask")
_KEPT = 1000  # answers of the processor that are kept: one for a picture of many tokens takes 50 KB
_PROBE = "\ufdd1"  # a text that no template writes by itself


class Planned(NamedTuple):
    """A sample as planned.

    Attributes:
        encoded: its tokens and which of them are trained. No token of a picture is.
        text: what the processor is given, with one mark for each picture and video.
        picture_tokens: tokens that stand for pictures and videos.
    """

    encoded: Encoded
    text: str
    picture_tokens: int


class PictureEncoder:
    """Encodes conversations with pictures, of which it knows the sizes alone.

    Args:
        processor: the model's processor.
        loss_on: "assistant", "last_turn" or "all"; see `encode_conversation`.
        videos: how videos are shown.

    Attributes:
        blank: the size of a blank picture; a processor that does not resize wants that of the data.

    Raises:
        ValueError: the processor names no token for a picture, or its tokenizer gives no character offsets.
    """

    def __init__(self, processor: Any, loss_on: LossOn, videos: How = "auto") -> None:
        self.processor, self.loss_on, self._how = processor, loss_on, videos
        self.blank: Size = (BLANK, BLANK)
        self.tokenizer = with_template(processor)
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} gives no character offsets, from which it is known which tokens the "
                "assistant wrote. Use the fast variant of this tokenizer."
            )
        token = getattr(processor, "image_token", None)
        if not isinstance(token, str) or not token:
            raise ValueError(
                f"{type(processor).__name__} does not say which token stands for a picture (image_token), so its "
                "pictures cannot be placed."
            )
        self.token = token
        self._finder = TurnFinder(special_tokens(self.tokenizer, len(self.tokenizer)), loss_on == "last_turn")
        self._parts: dict[str, bool] = {}
        self._replacements: dict[tuple[Shown, ...], list[str]] = {}

    @cached_property
    def videos(self) -> VideoPart | None:
        """The processor's part for videos; None: their frames become pictures.

        Raises:
            ValueError: the processor's part is asked for, and it has none that works here.
        """
        if self._how == "pictures":
            return None
        if self.video_obstacle is None:
            return VideoPart(self.processor)
        if self._how == "processor":
            raise ValueError(
                f"videos='processor': {self.video_obstacle}. Set videos='pictures': each frame becomes a picture."
            )
        return None

    @cached_property
    def video_obstacle(self) -> str | None:
        """Why the processor cannot show videos as videos; None: it can."""
        return obstacle(self.processor) or self._unwritten()

    @cached_property
    def mark(self) -> re.Pattern[str]:
        """What the template writes for a picture or a video."""
        tokens = [self.token] if self.videos is None else [self.token, self.videos.token]
        return re.compile("|".join(f"({re.escape(token)})" for token in tokens))

    @cached_property
    def tokenwise(self) -> dict[str, int]:
        """The inputs that have an entry for each token, with their numbers of dimensions. They grow with the text.

        The shape of one tensor does not tell: there may be as many patches of pictures as tokens of text.
        """
        blank = Image.new("RGB", self.blank)
        short, long = (self.inputs([f"{self.token}{text}"], [[blank]]) for text in (".", ". . . ."))
        grows = [key for key in short if key not in _OWN and isinstance(short[key], Tensor)]
        return {key: short[key].ndim for key in grows if short[key].shape != long[key].shape}

    @property
    def crossing(self) -> str | None:
        """The input that says which token sees which picture, of a model that sees them by cross-attention."""
        return next((key for key, dimensions in self.tokenwise.items() if dimensions > 2), None)

    def plan(self, conversation: Conversation, shown: Sequence[Shown]) -> Planned:
        """Encode a conversation.

        Args:
            conversation: its content is a list of parts; see `RowReader`.
            shown: its pictures and videos, in order.

        Raises:
            ValueError: the template refuses it, or writes another number of marks than there are pictures or videos.
        """
        text, spans = self._rendered(conversation)
        marks = list(self.mark.finditer(text))
        self._check_marks(text, [match.lastindex == 2 for match in marks], shown)
        found = [match.span() for match in marks]
        added = inserted_text(self.processor, text)  # some processors begin the text with BOS
        pieces = self._replaced(tuple(shown))
        expanded, placed = _expand(added, self.mark, pieces)
        moved = [_moved(span, found, pieces, len(added) - len(text)) for span in spans]
        tokens = self.tokenizer(
            expanded, return_offsets_mapping=True, return_attention_mask=False, verbose=False, **self._options(text)
        )
        ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
        of_pictures = overlapping(offsets, placed) if placed else [False] * len(ids)
        if placeless := self._placeless(ids, of_pictures):
            raise ValueError(
                f"a text has {placeless!r}, which stands for a part of a picture in {type(self.processor).__name__}. "
                f"Remove it from the text:\n{shortened(text)}"
            )
        everything = self.loss_on == "all"
        trained = all_but_bos(self.tokenizer, ids).trained if everything else overlapping(offsets, moved)
        return Planned(Encoded(ids, [t and not s for t, s in zip(trained, of_pictures)]), text, sum(of_pictures))

    def inputs(self, texts: Sequence[str], seen: Sequence[Sequence[Seen]]) -> Any:
        """What the processor makes of planned texts and their pictures and videos, padded: tensors by name.

        Args:
            texts: of samples with pictures or videos, as planned.
            seen: by each.
        """
        options = self._options(texts[0])
        assert all(self._options(text) == options for text in texts), "texts of one template begin alike"
        pictures = [[item for item in own if not isinstance(item, tuple)] for own in seen]
        films = [item for own in seen for item in own if isinstance(item, tuple)]
        if films:
            assert self.videos is not None, "else frames are pictures"
            pictures = [own for own in pictures if own]
            options |= {"videos": [frames for frames, _ in films]}
            options |= self.videos.options([footage for _, footage in films])
        return self.processor(text=list(texts), images=pictures or None, padding=True, return_tensors="pt", **options)

    def _unwritten(self) -> str | None:
        """Why the chat template cannot show a video as the processor wants it; None: it can."""
        token = self.processor.video_token
        if self.tokenizer.chat_template is None:
            return None
        turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": _PROBE}]}
        try:
            text = RenderedChat(self.tokenizer, [turn], None).text
        except ValueError:
            text = ""
        return None if text.count(token) == 1 else f"the chat template writes no {token!r} for a video"

    def _check_marks(self, text: str, films: Sequence[bool], shown: Sequence[Shown]) -> None:
        wanted = [isinstance(item, Footage) for item in shown]
        if list(films) == wanted:
            return
        video = None if self.videos is None else self.videos.token
        for what, token, film in (("picture", self.token, False), ("video", video, True)):
            if films.count(film) != wanted.count(film):
                raise ValueError(
                    f"the chat template wrote {films.count(film)} marks for {what}s ({token!r}), and the sample has "
                    f"{wanted.count(film)} {what}(s). Use a template that writes {what}s, and remove the mark from "
                    f"texts that mean no {what}. The conversation as rendered:\n{shortened(text)}"
                )
        raise ValueError(f"the chat template changes the order of pictures and videos:\n{shortened(text)}")

    @cached_property
    def _seen_ids(self) -> set[int]:
        """Ids of tokens whose embeddings the model replaces with features of pictures and videos."""
        found: set[Any] = set()
        for name in ("image_token_id", "video_token_id"):
            one, several = getattr(self.processor, name, None), getattr(self.processor, f"{name}s", ())
            found |= {one} if one in several or not several else set(several)  # the one may be the mark alone
        return found - {None}

    def _placeless(self, ids: Sequence[int], of_pictures: Sequence[bool]) -> str | None:
        """The first token that stands for a part of a picture, and that no picture of the sample wrote."""
        found = next((i for i, placed in zip(ids, of_pictures) if not placed and i in self._seen_ids), None)
        return None if found is None else str(self.tokenizer.convert_ids_to_tokens(found))

    def _rendered(self, conversation: Conversation) -> tuple[str, list[Span]]:
        if self.tokenizer.chat_template is None:
            if conversation.prompt_completion is not None:
                return self._joined(*conversation.prompt_completion)
            tokens = {"image": self.token, "video": self.videos.token if self.videos else ""}
            if (pair := _question_and_answer(conversation.messages, tokens)) is not None:
                return self._joined(*pair)
            raise ValueError(
                "This processor has no chat template, so it cannot turn a conversation into tokens. Set one with "
                "chat_template=, or give rows with one question and its answer."
            )
        messages = [self._as_the_template_takes_it(message) for message in conversation.messages]
        chat = RenderedChat(self.tokenizer, messages, conversation.tools)
        return chat.text, [] if self.loss_on == "all" else self._finder.spans(chat)

    def _as_the_template_takes_it(self, message: Message) -> Message:
        """A message in parts, or with its text where the template writes text alone in turns of this role."""
        role = message["role"]
        if role not in self._parts:
            self._parts[role] = takes_parts(self.tokenizer, role)
        if self._parts[role]:
            return message
        _refuse_pictures(message)
        return as_text([message])[0]

    def _joined(self, prompt: str, completion: str) -> tuple[str, list[Span]]:
        """Prompt, completion and EOS, of a base model."""
        end = self.tokenizer.eos_token or ""
        text = prompt + completion + end
        return text, [(len(prompt), len(text))]

    def _options(self, text: str) -> dict[str, Any]:
        """As transformers' `apply_chat_template`: what begins with BOS gets no more special tokens."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}

    def _replaced(self, shown: tuple[Shown, ...]) -> list[str]:
        """What the processor writes for each of a sample's pictures and videos. It may depend on the other ones."""
        if not shown:
            return []
        if shown not in self._replacements:
            if len(self._replacements) >= _KEPT:  # of a million sizes they would fill the memory
                self._replacements.clear()
            self._replacements[shown] = replacements(self.processor, self.token, shown, self.videos)
        return self._replacements[shown]


def with_template(processor: Any) -> Any:
    """The processor's tokenizer with the processor's chat template, as a copy."""
    tokenizer = copy.copy(processor.tokenizer)
    template = getattr(processor, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()))
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def replacements(processor: Any, token: str, shown: Sequence[Shown], videos: VideoPart | None) -> list[str]:
    """What a processor writes for pictures and videos of one sample, found with blank ones.

    Args:
        processor: the processor.
        token: its mark for a picture.
        shown: the pictures and videos.
        videos: its part for videos; None: there are none.

    Raises:
        ValueError: it does not say.
    """
    pictures = [Image.new("RGB", item) for item in shown if not isinstance(item, Footage)]
    films = [item for item in shown if isinstance(item, Footage)]
    tokens = [videos.token if videos and isinstance(item, Footage) else token for item in shown]
    options: dict[str, Any] = {"return_tensors": "pt"}  # some read their own tensors
    if films and videos is not None:
        options |= {"videos": [item.blank() for item in films], **videos.options(films)}
    made = processor(
        text=["".join(f"{mark}\n" for mark in tokens)],
        images=[pictures] if pictures else None,
        return_text_replacement_offsets=True,
        **options,
    )
    found = made.get("text_replacement_offsets")
    if not found:
        if list(made["input_ids"][0]).count(processor.tokenizer.convert_tokens_to_ids(token)) != tokens.count(token):
            raise ValueError(
                f"{type(processor).__name__} does not say what it writes for a picture "
                "(return_text_replacement_offsets), so its tokens cannot be planned. Use a model of another family."
            )
        return tokens  # pictures are seen by cross-attention: the mark stays
    assert len(found[0]) == len(shown), "one replacement for each picture and video"
    return [item["replacement"] for item in found[0]]


def inserted_text(processor: Any, text: str) -> str:
    """`text` as the processor reads it, before it puts tokens in place of marks.

    Raises:
        ValueError: it changes more than the beginning.
    """
    _, prepared, *_ = processor.prepare_inputs_layout(text=[text])
    found = str(prepared[0] if isinstance(prepared, list) else prepared)
    begins = re.match(f"(?:{re.escape(processor.image_token)})*", text)  # BOS may go behind the first marks
    assert begins is not None, "an empty text matches"
    if not found.endswith(text[begins.end() :]):
        raise ValueError(f"{type(processor).__name__} changes the text before it reads it: {shortened(found)!r}.")
    return found


def takes_parts(tokenizer: Any, role: str = "user") -> bool:
    """Whether the chat template writes content that is a list of parts, and not its Python form, in turns of a role."""
    turn = {"role": role, "content": [{"type": "text", "text": _PROBE}]}
    parts = role != "user" and takes_parts(tokenizer)
    asked = {"role": "user", "content": [{"type": "text", "text": "."}] if parts else "."}
    chats: dict[str, list[Message]] = {"user": [turn], "system": [turn, asked], "developer": [turn, asked]}
    try:
        text = RenderedChat(tokenizer, chats.get(role, [asked, turn]), None).text
    except ValueError:
        return False
    return _PROBE in text and "'type'" not in text and '"type"' not in text


def _refuse_pictures(message: Message) -> None:
    content = message.get("content")
    if isinstance(content, list) and any(part["type"] != "text" for part in content):
        raise ValueError(
            f"the chat template takes text alone in turns of {message['role']!r}, and this one has pictures or "
            "videos. Set chat_template=."
        )


def _question_and_answer(messages: Sequence[Message], tokens: Mapping[str, str]) -> tuple[str, str] | None:
    """Prompt and completion of a row of two turns, for a model without a chat template."""
    if [message["role"] for message in messages] != ["user", "assistant"]:
        return None
    prompt, answer = (
        "".join(part["text"] if part["type"] == "text" else tokens[part["type"]] for part in message["content"])
        for message in messages
    )
    return prompt, answer


def _expand(text: str, mark: re.Pattern[str], pieces: Sequence[str]) -> tuple[str, list[Span]]:
    """`text` with pieces in place of its marks, and where they lie."""
    result, placed, last, length = [], [], 0, 0
    for match, piece in zip(mark.finditer(text), pieces):
        before = text[last : match.start()]
        result += [before, piece]
        length += len(before)
        placed.append((length, length + len(piece)))
        length += len(piece)
        last = match.end()
    return "".join([*result, text[last:]]), placed


def _moved(span: Span, marks: Sequence[Span], pieces: Sequence[str], begin: int) -> Span:
    """A span of the rendered text, in the text with pieces in place of marks.

    Args:
        span: no mark lies across its ends.
        marks: where they are in the rendered text.
        pieces: what stands in their place.
        begin: characters that come before the rendered text.
    """
    gained = [len(piece) - (end - start) for piece, (start, end) in zip(pieces, marks)]

    def shift(place: int) -> int:
        return place + begin + sum(more for more, (_, end) in zip(gained, marks) if end <= place)

    return shift(span[0]), shift(span[1])
