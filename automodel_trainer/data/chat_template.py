"""From a conversation to tokens: the ids that the model reads, and which of them it is trained to write.

The tokenizer's chat template is used unchanged. We render the conversation to text once, find the characters of each
assistant turn (`assistant_spans.py`), and tokenize the whole text once. So the ids are exactly those of
`tokenizer.apply_chat_template`. A token is trained if it overlaps an assistant turn.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from automodel_trainer.data.assistant_spans import assistant_spans
from automodel_trainer.data.built_in_templates import TEMPLATES
from automodel_trainer.data.formats import Conversation
from automodel_trainer.data.rendered_chat import RenderedChat, Span, shared_length
from automodel_trainer.data.turn_marks import TurnFinder

LossOn = Literal["assistant", "last_turn", "all"]


class Encoded(NamedTuple):
    """One sample. `input_ids` and `trained` have the same length; `trained[i]` says whether token i has a label."""

    input_ids: list[int]
    trained: list[bool]


class Sample(NamedTuple):
    """As `Encoded`, with the marks as a bool array `[n]`: a list holds a Python object for each token."""

    input_ids: list[int]
    trained: np.ndarray


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, loss_on: LossOn = "assistant") -> Encoded:
    """Encode one row with the chat template, or as prompt + completion + EOS if the tokenizer has no template.

    Args:
        tokenizer: the tokenizer.
        conversation: the row.
        loss_on: "assistant" = every assistant turn; "last_turn" = the last one; "all" = every token but BOS.

    Raises:
        ValueError: there is no chat template and the row is not prompt/completion; see also `encode_conversation`.
    """
    if tokenizer.chat_template is None and conversation.prompt_completion is not None:
        return encode_prompt_completion(tokenizer, *conversation.prompt_completion, loss_on=loss_on)
    return encode_conversation(tokenizer, conversation.messages, conversation.tools, loss_on)


class BatchEncoder:
    """Encodes conversations as `encode` does, many at a time: it is called for batches of one data set.

    Args:
        tokenizer: the tokenizer.
        loss_on: see `encode_conversation`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
        _check_loss_on(loss_on)
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self._finder: TurnFinder | None = None

    def place(self, conversation: Conversation) -> tuple[str, list[Span]] | Encoded:
        """Render a conversation and place its turns; one without a template, or a slow tokenizer's, is encoded at once.

        Raises:
            ValueError: as `encode`.
        """
        if self.tokenizer.chat_template is None or not self.tokenizer.is_fast:
            return encode(self.tokenizer, conversation, self.loss_on)
        chat = RenderedChat(self.tokenizer, conversation.messages, conversation.tools)
        if self.loss_on == "all":
            return chat.text, []
        if self._finder is None:
            special = special_tokens(self.tokenizer, len(self.tokenizer))
            self._finder = TurnFinder(special, self.loss_on == "last_turn")
        return chat.text, self._finder.spans(chat)

    def encode(self, placed: list[tuple[str, list[Span]] | Encoded]) -> list[Sample]:
        """Tokenize what `place` returned, in one call of the tokenizer."""
        texts = [item[0] for item in placed if not isinstance(item, Encoded)]
        batch: Any = iter(())
        if texts:
            tokens = self.tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            batch = iter(zip(tokens["input_ids"], tokens.encodings))
        return [self._sample(item, *(() if isinstance(item, Encoded) else next(batch))) for item in placed]

    def _sample(self, item: tuple[str, list[Span]] | Encoded, ids: Any = None, encoding: Any = None) -> Sample:
        if isinstance(item, Encoded):
            return Sample(item.input_ids, np.array(item.trained, dtype=bool))
        if self.loss_on == "all":
            return Sample(ids, np.array(all_but_bos(self.tokenizer, ids).trained, dtype=bool))
        trained = between_edges(encoding, item[1])
        if trained is None:
            trained = np.array(overlapping(encoding.offsets, item[1]), dtype=bool)
        return Sample(ids, trained)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    loss_on: LossOn = "assistant",
) -> Encoded:
    """Render with the tokenizer's chat template, tokenize, and mark the tokens that the assistant writes.

    An assistant turn is trained from the end of its generation prompt through its end-of-turn token: content,
    reasoning and tool calls, as the template renders them. Headers, the newline after the end-of-turn token, tool
    results and all other roles are not trained. Templates with `{% generation %}` mark the assistant's text
    themselves. An assistant message with `"weight": 0` (OpenAI's key) is part of the context and not trained.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: dicts with `role` and `content` (and `tool_calls`, `reasoning_content`, …), as templates expect them.
        tools: JSON schemas for the template.
        loss_on: "assistant" = every assistant turn; "last_turn" = the last one; "all" = every token but BOS.

    Raises:
        ValueError: there is no chat template, the template refuses the conversation, or an assistant turn cannot be
            found in the rendered text. The message shows the text.
    """
    _check_loss_on(loss_on)
    if tokenizer.chat_template is None:
        raise ValueError(
            "This tokenizer has no chat template, so it cannot turn a conversation into tokens. Set one "
            f"(ChatDataModule(chat_template=…): {', '.join(TEMPLATES)}, or a Jinja file; or use the tokenizer of the "
            "model's instruct variant), or use a data "
            "set with `prompt` and `completion` columns, which is trained as prompt + completion + EOS."
        )
    chat = RenderedChat(tokenizer, messages, tools)
    if loss_on == "all":
        return all_but_bos(tokenizer, _tokenize(tokenizer, chat.text, []).input_ids)
    spans = assistant_spans(chat, special_tokens(tokenizer, len(tokenizer)), last_turn=loss_on == "last_turn")
    return _tokenize(tokenizer, chat.text, spans)


def encode_prompt_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, loss_on: LossOn = "assistant"
) -> Encoded:
    """Encode prompt + completion + EOS without a template.

    The two texts are joined without a separator and tokenized together, so words are split as in running text. BOS is
    included if the tokenizer adds it.

    Args:
        tokenizer: a tokenizer with an EOS token.
        prompt: the text before the completion, not trained.
        completion: the text to learn.
        loss_on: "all" trains every token but BOS; otherwise the completion and EOS are trained.

    Raises:
        ValueError: the tokenizer has no EOS token, so the model could not learn to stop.
    """
    _check_loss_on(loss_on)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("This tokenizer has no EOS token, so the model cannot learn to stop: set tokenizer.eos_token.")
    span = (len(prompt), len(prompt) + len(completion))
    input_ids, trained = _tokenize(tokenizer, prompt + completion, [span], add_special_tokens=True)
    while input_ids and input_ids[-1] == eos:  # some tokenizers and rows add EOS themselves: keep one
        input_ids, trained = input_ids[:-1], trained[:-1]
    encoded = Encoded([*input_ids, eos], [*trained, True])
    return all_but_bos(tokenizer, encoded.input_ids) if loss_on == "all" else encoded


@lru_cache(maxsize=8)
def special_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    """A pattern that matches every special token of the tokenizer, longest first.

    Args:
        tokenizer: the tokenizer.
        size: `len(tokenizer)`. It is part of the cache's key, because tokens may be added later.
    """
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _check_loss_on(loss_on: str) -> None:
    if loss_on not in get_args(LossOn):
        raise ValueError(f"loss_on={loss_on!r} is unknown. Allowed: {', '.join(map(repr, get_args(LossOn)))}.")


def all_but_bos(tokenizer: PreTrainedTokenizerBase, input_ids: list[int]) -> Encoded:
    """A sample of which every token but BOS is trained."""
    bos = tokenizer.bos_token_id
    if bos == tokenizer.eos_token_id:  # the same token ends documents: only the first one is BOS
        return Encoded(input_ids, [i > 0 or token != bos for i, token in enumerate(input_ids)])
    return Encoded(input_ids, [token != bos for token in input_ids])


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span], add_special_tokens: bool = False
) -> Encoded:
    """Tokenize a text and mark the tokens that overlap the spans (which are in order and do not overlap)."""
    if not tokenizer.is_fast:
        return _tokenize_without_offsets(tokenizer, text, spans, add_special_tokens)
    tokens = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return Encoded(tokens["input_ids"], overlapping(tokens["offset_mapping"], spans))


def between_edges(encoding: Any, spans: list[Span]) -> np.ndarray | None:
    """`overlapping`, found by asking for the tokens at the edges of spans alone: offsets are a Python object each.

    Args:
        encoding: a `tokenizers.Encoding`, whose tokens lie in the order of the text.
        spans: in order, not overlapping.

    Returns:
        bool `[tokens]`; None if a token has no place in the text.
    """
    trained = np.zeros(len(encoding), dtype=bool)
    places = range(len(encoding))

    def end(token: int) -> int:
        return encoding.token_to_chars(token)[1]  # type: ignore[no-any-return]

    def begin(token: int) -> int:
        own, stop = encoding.token_to_chars(token)
        before = end(token - 1) if token else 0
        return min(own, before) if stop > before else own  # type: ignore[no-any-return]

    try:
        for start, stop in spans:
            if start == stop:
                continue
            first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
            if first is None:  # a token of spaces, which its offsets leave out
                first = bisect_right(places, start, key=end)
            after = bisect_left(places, stop, lo=first, key=begin) if last is None else last + 1
            while after < len(trained) and begin(after) < stop:  # pieces of one character
                after += 1
            trained[first:after] = True
    except TypeError:  # None has no parts
        return None
    return trained


def overlapping(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Whether each token overlaps a span.

    Byte-level tokenizers may trim spaces from the offsets, so that a token of spaces is empty. We therefore let each
    token begin where the one before it ends. Tokens that are pieces of one character share its offsets.
    """
    trained = [False] * len(offsets)
    remaining = iter(spans)
    start, stop = next(remaining, (0, 0))
    reached = 0
    for i, (begin, end) in enumerate(offsets):
        begin = min(begin, reached) if end > reached else begin
        reached = max(reached, end)
        while stop <= begin and (following := next(remaining, None)) is not None:
            start, stop = following
        trained[i] = begin < stop and end > start and end > begin
    return trained


def _tokenize_without_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span], add_special_tokens: bool
) -> Encoded:
    """`_tokenize` for slow tokenizers, which give no offsets.

    To find the tokens before a position, we tokenize the text up to it. The tokens that both results share lie before
    the position.

    Raises:
        ValueError: a token crosses the end of a span, so it is neither trained nor untrained.
    """

    def ids_of(part: str) -> list[int]:
        return tokenizer.encode(part, add_special_tokens=add_special_tokens, verbose=False)

    input_ids = ids_of(text)
    trained = [False] * len(input_ids)
    for start, stop in spans:
        first = shared_length(input_ids, ids_of(text[:start]))
        last = len(input_ids)
        if stop < len(text):
            cut = ids_of(text[:stop])
            last = shared_length(input_ids, cut)
            if last < len(cut) - tokenizer.num_special_tokens_to_add() * add_special_tokens:
                raise ValueError(
                    f"{type(tokenizer).__name__} gives no character offsets, and one of its tokens crosses the end of "
                    f"a trained turn, {text[start:stop][-80:]!r}: use the fast variant of this tokenizer."
                )
        trained[first:last] = [True] * (last - first)
    return Encoded(input_ids, trained)
