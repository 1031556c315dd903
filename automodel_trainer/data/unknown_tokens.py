"""How much of the text a tokenizer turned into its unknown token: the model never sees what stood there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from automodel_trainer.data.batches import MicroBatch
from automodel_trainer.data.rows import TokenStore

SHARE = 0.01
"""From this share of the tokens on it is a warning. Less is stray characters, and stands in the summary alone."""
_SHOWN = 40  # tokens of the example
_FIRST = 100  # batches of a stream


def unknown_id(tokenizer: Any) -> int | None:
    """The id of the unknown token; None if there is none, or it also begins or ends documents and so has a meaning."""
    found = getattr(tokenizer, "unk_token_id", None)
    other = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "sep", "cls")}
    return found if isinstance(found, int) and found not in other else None


def unknown_share(store: TokenStore, tokenizer: Any, called: str, place_of: Callable[[int], str]) -> float:
    """The share of unknown tokens in tokenized samples. Above `SHARE` it warns and shows an example.

    Args:
        store: the samples.
        tokenizer: that made them.
        called: what the data is called, for the warning.
        place_of: says where a row of the data stands.
    """
    token = unknown_id(tokenizer)
    if token is None:
        return 0.0
    share, worst = store.share_of(token)
    if share >= SHARE:
        (document,) = store.fetch([worst])
        warn_of_unknown(called, tokenizer, share, place_of(document.sample_id), document.input_ids)
    return share


def warn_of_unknown(called: str, tokenizer: Any, share: float, place: str, ids: Sequence[int] | np.ndarray) -> None:
    """Say what share of the tokens is unknown, with the text around the first of an example."""
    ids = np.asarray(ids)
    start = max(0, int(np.argmax(ids == unknown_id(tokenizer))) - _SHOWN // 2)
    shown = tokenizer.decode(ids[start : start + _SHOWN].tolist())
    rank_zero_warn(
        f"{called}{share:.1%} of the tokens are the unknown token {tokenizer.unk_token!r}: the tokenizer has no tokens "
        f"for this text, and the model cannot learn what stood there. {place} became: {shown!r}. Use a tokenizer of "
        "this language or script, or clean the data."
    )


class UnknownInStream:
    """Looks at the first batches of a stream, and warns once.

    Args:
        tokenizer: that makes them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._id = tokenizer, unknown_id(tokenizer)
        self._left = 0 if self._id is None else _FIRST
        self._tokens = self._unknown = 0

    def look(self, batch: Sequence[MicroBatch]) -> None:
        """Count the tokens of a batch."""
        if self._left == 0:
            return
        self._left -= 1
        for part in batch:
            ids = part["input_ids"]
            found = ids == self._id
            self._tokens, self._unknown = self._tokens + ids.numel(), self._unknown + int(found.sum())
            if self._unknown >= SHARE * self._tokens and found.any():
                row = ids[int(found.sum(1).argmax())]
                share = self._unknown / self._tokens
                warn_of_unknown("the stream: so far ", self._tokenizer, share, "A row", row.numpy())
                self._left = 0
                return
