"""Prepare `make vlm`: a small vision-language model with random weights, and questions about pictures.

    python -m automodel_trainer.tools.vlm_quickstart [--output runs/vlm_quickstart]

The pictures and questions are those of the PyPI package `easy-vqa` (MIT): 5,000 pictures of one shape in one color, and
48,248 questions. The commonest answer to each question is right in 67 % of the test questions, so what a model answers
beyond that it has seen. The model reads words, not letters, and has 0.9 million parameters: a CPU trains it in minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel_trainer.tools.errors import explain_errors
from automodel_trainer.tools.prepared import is_prepared, new_folder

if TYPE_CHECKING:
    from transformers import ProcessorMixin

PACKAGE = "easy-vqa"
SPLITS = {"train": "train", "validation": "test"}
"""Our name of a split, and the package's."""
VERSION = 1  # increase it when what is prepared changes
SIZE, PATCH = 64, 16  # pixels on each side of a picture, and of a patch of it
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>", "<answer>")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<answer> {{ m['content'] }}</s>{% else %}<s>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


def prepare(output: str | Path) -> tuple[Path, Path]:
    """Create `output/model` and `output/data` unless they exist. Returns both folders.

    Raises:
        ValueError: the package with the pictures is not installed.
    """
    output, source = Path(output), find_data()
    output.mkdir(parents=True, exist_ok=True)
    made_from: dict[str, object] = {"version": VERSION, "package": PACKAGE}
    for name, write in {"data": _write_data, "model": _write_model}.items():
        with new_folder(output / name, made_from) as folder:
            if folder is not None:
                write(source, folder)
        assert is_prepared(output / name, made_from)
    return output / "model", output / "data"


def find_data() -> Path:
    """The folder of pictures and questions in the installed package.

    Raises:
        ValueError: the package is not installed.
    """
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ValueError(
            f"The pictures come from the Python package {PACKAGE!r}, which is not installed: run `make vlm`."
        )
    return Path(spec.origin).parent / "data"


def questions(source: Path, split: str) -> list[tuple[str, str, int]]:
    """(question, answer, number of the picture) of one of the package's splits."""
    return [tuple(row) for row in json.loads((source / split / "questions.json").read_text())]


def _write_data(source: Path, folder: Path) -> None:
    """One jsonl file a split, with a picture, a question and an answer in each row, and the pictures beside it."""
    for name, split in SPLITS.items():
        shutil.copytree(source / split / "images", folder / split)
        with (folder / f"{name}.jsonl").open("w") as file:
            for question, answer, picture in questions(source, split):
                turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns, "image": f"{split}/{picture}.png"}) + "\n")


def _write_model(source: Path, folder: Path) -> None:
    """A model with random weights and its processor."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    rows = questions(source, "train")
    processor = _processor(
        sorted({word for question, answer, _ in rows for word in re.findall(r"\w+|\?", f"{question} {answer}")})
    )
    text = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": len(processor.tokenizer),
            "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    vision = {"model_type": "siglip_vision_model", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3,
              "num_attention_heads": 4, "image_size": SIZE, "patch_size": PATCH, "vision_use_head": False}  # fmt: skip
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=image,
                                  vision_feature_layer=-1, vision_feature_select_strategy="full")  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _processor(words: Sequence[str]) -> ProcessorMixin:
    """A processor with one token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    inner = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate((*SPECIAL, *words))}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    more: dict[str, Any] = {"extra_special_tokens": {"image_token": "<image>", "answer_token": "<answer>"}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=512, **tokens, **more)
    size = {"height": SIZE, "width": SIZE}
    pictures = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, size=size, crop_size=size)
    return LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, chat_template=TEMPLATE, patch_size=PATCH,
        vision_feature_select_strategy="full", num_additional_image_tokens=0,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m automodel_trainer.tools.vlm_quickstart", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--output", default="runs/vlm_quickstart", help="folder for model/ and data/ (default: %(default)s)"
    )
    model, data = prepare(parser.parse_args(argv).output)
    print(f"model: {model}, with random weights\ndata:  {data}, the pictures and questions of {PACKAGE}", flush=True)


if __name__ == "__main__":
    explain_errors(main)
