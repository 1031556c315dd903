"""`amt generate`: ask the model in a Hugging Face folder and see its answer token by token.

amt generate --model runs/quickstart/export --prompt "What does `math.hypot` do in Python?"
amt generate --model runs/vlm/export --image cat.jpg --prompt "What is this?"
amt generate --model runs/vlm/export --video dance.mp4 --prompt "What happens?"
amt generate --model runs/quickstart/export            # a conversation, one line at a time
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel_trainer.models.generation import encode, generation_config
from automodel_trainer.tools.visual_prompt import VisualPrompt

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def generate(
    model: str | Path,
    prompt: str | None,
    *,
    images: Sequence[str | Path] = (),
    videos: Sequence[str | Path] = (),
    video_fps: float | None = None,
    max_pixels: int | None = None,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> list[str]:
    """Load a model folder, stream the answers to the terminal and return them.

    Args:
        model: a folder with config, tokenizer and weights, or the id of a model in the local cache.
        prompt: the prompt. None: read one per line from standard input, as turns of one conversation. An empty line
            starts a new conversation.
        images: pictures that the first prompt shows, for a vision-language model.
        videos: videos that it shows after them, as files or as folders of frames.
        video_fps: frames per second of such folders, and how many of a file are taken. None: what the processor says.
        max_pixels: scale pictures and frames to so many pixels at most, as in training. None: no limit.
        system: a system message at the start of the conversation. The model must have a chat template.
        max_new_tokens: maximum number of tokens per answer.
        temperature: 0 always takes the most likely token (greedy); above 0, tokens are sampled.
        top_p: sample only from the most likely tokens with this total probability.
        seed: makes sampled answers repeatable.
        device: the device to run on. None: a GPU if there is one, otherwise the CPU.
        dtype: "auto" for the dtype of the files, or a torch dtype such as "bfloat16".

    Returns:
        One answer per prompt.

    Raises:
        ValueError: the folder is not a model folder, or an argument has a bad value.
    """
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels={max_pixels} must be at least 1.")
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}, max_new_tokens={max_new_tokens}: temperature must be at least "
            "0 (0 is greedy), top_p above 0 and at most 1, max_new_tokens at least 1."
        )
    check_folder(model)
    loaded, tokenizer = load(model, device=device, dtype=dtype)
    processor = _processor(model, loaded, tokenizer, asked=[*images, *videos])
    prompt_of = None if processor is None else VisualPrompt(processor, images, videos, video_fps, max_pixels)
    if system is not None and not tokenizer.chat_template:
        raise ValueError(f"{model} has no chat template, so it does not support a system message. Leave out `system`.")
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    config = generation_config(loaded, tokenizer, max_new_tokens, temperature, top_p)
    opening = [{"role": "system", "content": system}] if system is not None else []
    answers = []
    conversation = list(opening)
    for line in [prompt] if prompt is not None else _read_lines():
        if not line.strip():
            conversation = list(opening)
            continue
        conversation.append({"role": "user", "content": line})
        inputs = encode(tokenizer, conversation) if prompt_of is None else prompt_of.inputs(conversation)
        answers.append(_answer(loaded, tokenizer, inputs, config))
        conversation.append({"role": "assistant", "content": answers[-1]})
    return answers


def check_folder(model: str | Path) -> None:
    """Check that a folder has the files of a model. Other names are left to transformers.

    Raises:
        ValueError: the folder lacks its config or weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    has_weights = any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)
    lacks = [] if (folder / "config.json").is_file() else ["config.json"]
    lacks += [] if has_weights else ["weights (*.safetensors)"]
    if lacks:
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{folder} is not a model folder: it has no {' and no '.join(lacks)} (it contains: {inside}). Give a "
            "folder written by `save_pretrained`."
        )


def load(model: str | Path, device: str | None, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model, in eval mode and on its device, and its tokenizer.

    Raises:
        ValueError: the model cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from automodel_trainer.models.auto_classes import auto_class_of_folder, transformers_class

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        builder = transformers_class(auto_class_of_folder(model, local_files_only=True))
        loaded: Any = builder.from_pretrained(model, dtype=dtype, local_files_only=True)
    except (OSError, SafetensorError) as error:
        found = (
            "exists but cannot be loaded"
            if Path(model).is_dir()
            else "is neither a folder nor a model in the local cache"
        )
        raise ValueError(f"--model {model} {found}. Give a folder written by `save_pretrained`. ({error})") from error
    if not loaded.can_generate():
        raise ValueError(f"--model {model} is a {type(loaded).__name__}, which does not generate text.")
    return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def _processor(model: str | Path, loaded: Any, tokenizer: Any, asked: Sequence[str | Path]) -> Any:
    """The processor of a vision-language model that has a chat template; None for a model of text.

    Args:
        asked: pictures and videos that the prompt shows.

    Raises:
        ValueError: there are pictures, and the model sees none or has no template for them.
    """
    from automodel_trainer.models.auto_classes import WITH_PICTURES, auto_classes_of
    from automodel_trainer.models.files import resolve_folder
    from automodel_trainer.models.processors import has_processor, load_processor

    sees = WITH_PICTURES in auto_classes_of(loaded)
    if asked and not sees:
        raise ValueError(
            f"--image and --video are for models that see pictures, and {model} is a {type(loaded).__name__}."
        )
    if not sees or not (asked or has_processor(resolve_folder(model))):
        return None
    processor = load_processor(model)
    if processor.chat_template is None:
        if asked:
            raise ValueError(f"{model} has no chat template, which says where pictures stand in a prompt.")
        return None
    tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    return processor


def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    config: GenerationConfig,
) -> str:
    from transformers import TextStreamer

    inputs = inputs.to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(**inputs, generation_config=config, streamer=streamer)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True))


def _read_lines() -> Iterator[str]:
    """Yield the lines of standard input until its end. In a terminal, show a prompt mark."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("Type a line and press Enter. An empty line starts a new conversation. Ctrl-D exits.")
    try:
        while True:
            yield input("> " if interactive else "")
    except (EOFError, KeyboardInterrupt):
        if interactive:
            print()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="amt generate", description="Answer prompts with a model folder.")
    parser.add_argument("--model", required=True, help="folder with config, tokenizer and safetensors")
    parser.add_argument("--prompt", help="the prompt; without it, prompts are read from the terminal")
    parser.add_argument("--image", dest="images", action="append", default=[], help="a picture; may be repeated")
    parser.add_argument(
        "--video", dest="videos", action="append", default=[], help="a video, or a folder of frames; may be repeated"
    )
    parser.add_argument("--video-fps", type=float, help="frames per second: of folders, and how many of a file")
    parser.add_argument("--max-pixels", type=int, help="scale pictures to so many pixels at most, as in training")
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="the seed for sampled answers")
    parser.add_argument("--device", help="for example cuda:0 or cpu (default: a GPU when there is one)")
    parser.add_argument("--dtype", default="auto", help="for example bfloat16 (default: as saved)")
    generate(**vars(parser.parse_args(argv)))
