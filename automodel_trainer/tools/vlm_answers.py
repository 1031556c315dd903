"""How often a trained model answers questions about unseen pictures rightly: the end of `make vlm`.

    python -m automodel_trainer.tools.vlm_answers [--output runs/vlm_quickstart]

Transformers loads the export, and nothing of this project computes an answer. Beside the model's accuracy stands that
of the commonest answer to each question, which is what can be known without looking. A sheet of pictures with the
answers is written beside the export.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from automodel_trainer.tools.errors import explain_errors

BATCH = 256
SHEET = (6, 3)  # pictures in a row, and rows


class Question(NamedTuple):
    """A row of the data: its question, its answer and the file of its picture."""

    text: str
    answer: str
    picture: Path


def read(file: Path) -> list[Question]:
    """The rows of one file that `vlm_quickstart` wrote.

    Raises:
        ValueError: there is no such file.
    """
    if not file.is_file():
        raise ValueError(f"{file} is not there. `make vlm` writes it.")
    rows = map(json.loads, file.read_text().splitlines())
    return [
        Question(
            row["messages"][0]["content"].replace("<image>", ""),
            row["messages"][1]["content"],
            file.parent / row["image"],
        )
        for row in rows
    ]


def answers(model: Path, questions: Sequence[Question]) -> list[str]:
    """What the model in a folder answers: its most likely word.

    Raises:
        ValueError: there is no model.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not (model / "config.json").is_file():
        raise ValueError(f"{model} holds no model. `make vlm` writes it.")
    processor = AutoProcessor.from_pretrained(model)
    loaded = AutoModelForImageTextToText.from_pretrained(model).eval()
    processor.tokenizer.padding_side = "left"  # the last token of every row is the end of its prompt
    found: list[str] = []
    for start in range(0, len(questions), BATCH):
        inputs = _inputs(processor, questions[start : start + BATCH])
        with torch.no_grad():
            likely = loaded(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
        found += processor.tokenizer.batch_decode(likely[:, None])
    return [answer.strip() for answer in found]


def _inputs(processor: Any, questions: Sequence[Question]) -> Any:
    from PIL import Image

    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        for question in questions
    ]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    pictures = [[Image.open(question.picture).convert("RGB")] for question in questions]
    return processor(text=texts, images=pictures, padding=True, return_tensors="pt", add_special_tokens=False)


def commonest(train: Sequence[Question]) -> dict[str, str]:
    """The commonest answer to each question."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        counts[question.text][question.answer] += 1
    return {text: count.most_common(1)[0][0] for text, count in counts.items()}


def share(right: Sequence[bool]) -> float:
    """The part that is true."""
    return sum(right) / len(right)


def draw(questions: Sequence[Question], given: Sequence[str], file: Path) -> None:
    """Write a sheet of pictures, each with its question and answer; the right answer follows a wrong one."""
    from PIL import Image, ImageDraw

    columns, rows = SHEET
    width, height = 250, 140
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    step = max(1, len(questions) // (columns * rows))
    for place, index in enumerate(range(0, min(len(questions), step * columns * rows), step)):
        x, y = place % columns * width + 10, place // columns * height + 10
        question, answer = questions[index], given[index]
        right = answer == question.answer
        sheet.paste(Image.open(question.picture).convert("RGB").resize((84, 84)), (x, y))
        pen.text((x, y + 90), question.text, fill="black")
        verdict = answer if right else f"{answer}  (it is {question.answer})"
        pen.text((x, y + 106), verdict, fill="darkgreen" if right else "firebrick")
    sheet.save(file)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m automodel_trainer.tools.vlm_answers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=Path("runs/vlm_quickstart"), help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="ask so many questions at most")
    arguments = parser.parse_args(argv)
    train, unseen = (read(arguments.output / "data" / f"{split}.jsonl") for split in ("train", "validation"))
    unseen = unseen[:: max(1, len(unseen) // arguments.limit)] if arguments.limit else unseen
    given, blind = answers(arguments.output / "hf", unseen), commonest(train)
    sheet = arguments.output / "answers.png"
    draw(unseen, given, sheet)
    for question, answer in list(zip(unseen, given))[:: max(1, len(unseen) // 6)][:6]:
        mark = "✓" if answer == question.answer else f"✗ it is {question.answer}"
        print(f"  {question.picture.name:>9}  {question.text:<48} {answer:<10} {mark}")
    without = share([blind.get(question.text) == question.answer for question in unseen])
    seeing = share([answer == question.answer for question, answer in zip(unseen, given)])
    print(f"{len(unseen):,} questions about unseen pictures: {seeing:.1%} right; without looking, {without:.1%}.")
    print(f"pictures with answers: {sheet}")


if __name__ == "__main__":
    explain_errors(main)
