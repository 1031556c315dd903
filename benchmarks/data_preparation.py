"""How fast chats become samples, against the chat template and the tokenizer alone. One process, CPU seconds.

python benchmarks/data_preparation.py [--tokenizer FOLDER]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from itertools import chain
from typing import Any

from transformers import AutoTokenizer

from automodel_trainer import ChatDataModule
from automodel_trainer.data import tokens
from automodel_trainer.data.chat_template import BatchEncoder
from automodel_trainer.data.formats import Conversation
from automodel_trainer.data.rendered_chat import RenderedChat
from automodel_trainer.data.sources import load_rows

AT_ONCE = 100


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Three turns each of some hundred characters, drawn from words of several lengths."""
    draw = random.Random(0)
    words = ["a", "the", "model", "training", "of", "language", "data", "12", "is", "parallel"]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(20, 80)))

    pairs = [[("user", text()), ("assistant", text())] for _ in range(3 * count)]
    turns = [[{"role": role, "content": content} for role, content in pair] for pair in pairs]
    return [list(chain(*turns[3 * i : 3 * i + 3])) for i in range(count)]


def seconds(function: Callable[[], Any]) -> float:
    """CPU seconds of the fastest of three calls."""
    found = []
    for _ in range(3):
        begun = time.process_time()
        function()
        found.append(time.process_time() - begun)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", help="a folder; by default the byte tokenizer of the tests")
    parser.add_argument("--count", type=int, default=1000)
    args = parser.parse_args()
    if args.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        from tests.tiny import tiny_tokenizer

        tokenizer = tiny_tokenizer()
    chats = conversations(args.count)
    batches = [chats[i : i + AT_ONCE] for i in range(0, len(chats), AT_ONCE)]

    def alone() -> int:
        count = 0
        for batch in batches:
            texts = [RenderedChat(tokenizer, chat, None).text for chat in batch]
            encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
            count += sum(len(encoding.ids) for encoding in encoded)
        return count

    def with_masks() -> None:
        encoder = BatchEncoder(tokenizer, "assistant")
        for batch in batches:
            encoder.encode([encoder.place(Conversation(chat)) for chat in batch])

    data = ChatDataModule([], tokenizer=tokenizer, cache=False)
    rows = load_rows([{"messages": chat} for chat in chats])
    tokens._processes = lambda rows: None  # type: ignore[assignment]

    def whole() -> None:
        data._samples(rows)

    total, base = alone(), seconds(alone)
    print(f"{total:,} tokens in {len(chats):,} chats, {type(tokenizer).__name__}")
    for name, function in (("template + encode_batch", alone), ("with masks", with_masks), ("rows to samples", whole)):
        taken = seconds(function) if function is not alone else base
        print(f"{name:<24} {total / taken:>12,.0f} tokens/s  {base / taken:.2f}")


if __name__ == "__main__":
    main()
