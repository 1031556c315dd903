"""From a conversation with pictures to tokens: the ids that the model reads, and which of them are trained.

The processor's chat template is used unchanged, and so is its rule for what a picture becomes in the text. A blank
picture of the same size becomes the same tokens, so a sample is planned from the headers of its pictures. The template
writes one mark for a picture, and the processor puts many tokens in its place; spans of characters move along.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from automodel_trainer.data.chat_template import Encoded, LossOn, all_but_bos, overlapping, special_tokens
from automodel_trainer.data.formats import Conversation
from automodel_trainer.data.messages import Message
from automodel_trainer.data.pictures.rows import as_text
from automodel_trainer.data.rendered_chat import RenderedChat, Span, shortened
from automodel_trainer.data.turn_marks import TurnFinder

Size = tuple[int, int]
"""Width and height of a picture."""
_PROBE = "\ufdd1"  # a text that no template writes by itself


class Planned(NamedTuple):
    """A sample as planned.

    Attributes:
        encoded: its tokens and which of them are trained. No token of a picture is.
        text: what the processor is given, with one mark for each picture.
        picture_tokens: tokens that stand for pictures.
    """

    encoded: Encoded
    text: str
    picture_tokens: int


class PictureEncoder:
    """Encodes conversations with pictures, of which it knows the sizes alone.

    Args:
        processor: the model's processor.
        loss_on: "assistant", "last_turn" or "all"; see `encode_conversation`.

    Raises:
        ValueError: the processor names no token for a picture, or its tokenizer gives no character offsets.
    """

    def __init__(self, processor: Any, loss_on: LossOn) -> None:
        self.processor, self.loss_on = processor, loss_on
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
        self.mark = re.compile(re.escape(token))
        self.token = token
        self._finder = TurnFinder(special_tokens(self.tokenizer, len(self.tokenizer)), loss_on == "last_turn")
        self._parts: dict[str, bool] = {}
        self._replacements: dict[tuple[Size, ...], list[str]] = {}

    def plan(self, conversation: Conversation, sizes: Sequence[Size]) -> Planned:
        """Encode a conversation.

        Args:
            conversation: its content is a list of parts; see `RowReader`.
            sizes: of its pictures.

        Raises:
            ValueError: the template refuses it, or writes another number of marks than there are pictures.
        """
        text, spans = self._rendered(conversation)
        found = [match.span() for match in self.mark.finditer(text)]
        if len(found) != len(sizes):
            raise ValueError(
                f"the chat template wrote {len(found)} marks for pictures ({self.token!r}), and the sample has "
                f"{len(sizes)} picture(s). Use a template that writes pictures, and remove the mark from texts that "
                f"mean no picture. The conversation as rendered:\n{shortened(text)}"
            )
        added = inserted_text(self.processor, text)  # some processors begin the text with BOS
        pieces = self._replaced(tuple(sizes))
        expanded, placed = _expand(added, self.mark, pieces)
        moved = [_moved(span, found, pieces, len(added) - len(text)) for span in spans]
        tokens = self.tokenizer(
            expanded, return_offsets_mapping=True, return_attention_mask=False, verbose=False, **self._options(text)
        )
        ids, offsets = tokens["input_ids"], tokens["offset_mapping"]
        everything = self.loss_on == "all"
        trained = all_but_bos(self.tokenizer, ids).trained if everything else overlapping(offsets, moved)
        shown = overlapping(offsets, placed) if placed else [False] * len(ids)
        return Planned(Encoded(ids, [t and not s for t, s in zip(trained, shown)]), text, sum(shown))

    def inputs(self, texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Any:
        """What the processor makes of planned texts and their pictures, padded: tensors by name.

        Args:
            texts: of samples with pictures, as planned.
            pictures: of each.
        """
        groups = [(text, list(own), self._options(text)) for text, own in zip(texts, pictures)]
        options = groups[0][2]
        assert all(own == options for _, _, own in groups), "texts of one template begin alike"
        return self.processor(
            text=[text for text, _, _ in groups],
            images=[own for _, own, _ in groups],
            padding=True,
            return_tensors="pt",
            **options,
        )

    def _rendered(self, conversation: Conversation) -> tuple[str, list[Span]]:
        if self.tokenizer.chat_template is None:
            if conversation.prompt_completion is not None:
                return self._joined(*conversation.prompt_completion)
            if (pair := _question_and_answer(conversation.messages, self.token)) is not None:
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

    def _replaced(self, sizes: tuple[Size, ...]) -> list[str]:
        """What the processor writes for each of a sample's pictures. It may depend on the other ones."""
        if not sizes:
            return []
        if sizes not in self._replacements:
            self._replacements[sizes] = replacements(self.processor, self.token, sizes)
        return self._replacements[sizes]


def with_template(processor: Any) -> Any:
    """The processor's tokenizer with the processor's chat template, as a copy."""
    tokenizer = copy.copy(processor.tokenizer)
    template = getattr(processor, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()))
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def replacements(processor: Any, token: str, sizes: Sequence[Size]) -> list[str]:
    """What a processor writes for pictures of one sample, found with blank ones.

    Args:
        processor: the processor.
        token: its mark for a picture.
        sizes: of the pictures.
    """
    blanks = [Image.new("RGB", size) for size in sizes]
    made = processor(text=["".join(f"{token}\n" for _ in sizes)], images=[blanks], return_text_replacement_offsets=True)
    found = made.get("text_replacement_offsets")
    if not found:  # pictures are seen by cross-attention: the mark stays
        return [token] * len(sizes)
    assert len(found[0]) == len(sizes), "one replacement for each picture"
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
    if isinstance(content, list) and any(part["type"] == "image" for part in content):
        raise ValueError(
            f"the chat template takes text alone in turns of {message['role']!r}, and this one has pictures. Set "
            "chat_template=."
        )


def _question_and_answer(messages: Sequence[Message], token: str) -> tuple[str, str] | None:
    """Prompt and completion of a row of two turns, for a model without a chat template."""
    if [message["role"] for message in messages] != ["user", "assistant"]:
        return None
    prompt, answer = (
        "".join(token if part["type"] == "image" else part["text"] for part in message["content"])
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
