"""Checks of encoded samples. Data that would train wrongly without an error is refused, and a sample is shown."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from transformers import PreTrainedTokenizerBase

from automodel_trainer.data.chat_template import Encoded, special_tokens

Stop = Literal["trained", "masked", "absent"]


@dataclass
class SampleCheck:
    """The result of checking one sample.

    Attributes:
        trained: number of supervised tokens.
        stop: state of the token that ends the last trained turn: "trained"; "masked" = EOS follows but is not trained;
            "absent" = there is no EOS. None if nothing is trained.
    """

    trained: int
    stop: Stop | None


@dataclass
class DataCheck:
    """Counts of a data set.

    Attributes:
        samples: number of samples.
        tokens: number of tokens.
        trained: number of supervised tokens.
    """

    samples: int = 0
    tokens: int = 0
    trained: int = 0


def check_sample(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> SampleCheck:
    """Count the supervised tokens of a sample and check its start and end.

    Raises:
        ValueError: the sample starts with two BOS tokens, or tokens and marks differ in number.
    """
    input_ids, trained = encoded
    if len(input_ids) != len(trained):
        raise ValueError(
            f"A sample has {len(input_ids)} tokens and {len(trained)} marks: there must be one mark per token."
        )
    bos = tokenizer.bos_token_id
    if bos is not None and len(input_ids) > 1 and input_ids[0] == input_ids[1] == bos:
        raise ValueError(
            f"A sample starts with two BOS tokens ({tokenizer.bos_token!r}): the text or its chat template writes one "
            f"and the tokenizer adds another. Remove BOS from the text, or tokenize with add_special_tokens=False. The "
            f"sample:\n{render_tokens(tokenizer, input_ids, trained)}"
        )
    return SampleCheck(sum(trained), _stop(tokenizer, encoded))


def check_samples(tokenizer: PreTrainedTokenizerBase, samples: Iterable[Encoded]) -> DataCheck:
    """Check a whole data set. Warns if no turn ends with an end token.

    Raises:
        ValueError: there are no samples, a sample starts with two BOS tokens, the data set has no supervised token, or
            EOS is masked in every sample.
    """
    result, shown, stops = DataCheck(), None, set()
    for encoded in samples:
        sample = check_sample(tokenizer, encoded)
        result.samples += 1
        result.tokens += len(encoded[0])
        result.trained += sample.trained
        stops.add(sample.stop)
        shown = encoded if shown is None or (sample.trained and not any(shown[1])) else shown
    if shown is None:
        raise ValueError("The data set has no samples. Give at least one.")
    text = render_tokens(tokenizer, *shown)
    if result.trained == 0:
        raise ValueError(
            f"None of the {result.samples} samples has a supervised token, so there is nothing to train on. Either "
            f"the data has no assistant turn, or the chat template's {{% generation %}} marks nothing. Set "
            f"loss_on='all' to train every token. The first sample:\n{text}"
        )
    _check_stops(tokenizer, stops - {None}, text)
    return result


def render_tokens(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], trained: Sequence[bool], limit: int | None = 400
) -> str:
    """A sample as plain text, with « and » around its trained tokens; at most `limit` tokens (None: all)."""
    pairs = list(zip(input_ids, trained))[:limit]
    parts = []
    for is_trained, run in groupby(pairs, key=lambda pair: bool(pair[1])):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        parts.append(f"«{text}»" if is_trained else str(text))
    more = len(input_ids) - len(pairs)
    return "".join(parts) + (f" … ({more} more tokens)" if more else "")


def _stop(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> Stop | None:
    input_ids, trained = encoded
    if True not in trained:
        return None
    end = len(trained) - trained[::-1].index(True)
    ids = {token for token, is_trained in zip(input_ids, trained) if is_trained}
    # Several tokens, because white space may follow the end token.
    last = tokenizer.decode(input_ids[max(0, end - 3) : end], clean_up_tokenization_spaces=False)
    if tokenizer.eos_token_id in ids or _ends_with(special_tokens(tokenizer, len(tokenizer)), str(last)):
        return "trained"
    return "masked" if tokenizer.eos_token_id in input_ids[end : end + 1] else "absent"


def _ends_with(pattern: re.Pattern[str], text: str) -> bool:
    matches = list(pattern.finditer(text))
    return bool(matches) and not text[matches[-1].end() :].strip()


def _check_stops(tokenizer: PreTrainedTokenizerBase, stops: set[Stop | None], text: str) -> None:
    if stops == {"masked"}:
        same = tokenizer.pad_token_id == tokenizer.eos_token_id
        cause = (
            f"pad_token and eos_token are the same, {tokenizer.eos_token!r}, and padding is not trained: give the "
            f"tokenizer a separate pad token"
            if same
            else "the {% generation %} block of the chat template ends before EOS: move EOS inside"
        )
        raise ValueError(
            f"EOS ({tokenizer.eos_token!r}) follows every trained turn and is masked, so the model would never learn "
            f"to stop. Likely cause: {cause}. A sample:\n{text}"
        )
    if stops and "trained" not in stops:
        warnings.warn(
            f"No trained turn ends with a special token, so the model does not learn to stop: the chat template writes "
            f"no end-of-turn token, or leaves it outside {{% generation %}}. A sample:\n{text}",
            stacklevel=3,
        )
