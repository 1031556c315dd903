"""LoRA (r=16) on the language model of a vision-language model on one GPU: packed rows of 8,192 tokens.

`python benchmarks/vlm.py` runs each case in its own process on the same GPU: rows with pictures, rows of text alone
(the same language model, equal tokens), and transformers' Trainer with PEFT on the same samples, several of which make
one padded batch. Weights are random, pictures are drawn once as JPEG files.
`--tiny` is for a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cases import report, result_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests

VISION = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "depth": 32, "out_hidden_size": 3584}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {  # 7B
        "text_config": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
        "vision_config": {**VISION, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
        "mrope_section": [16, 24, 24],
    },
    "qwen3_vl": {  # 8B
        "text_config": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
                        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936},
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "depth": 27,
                          "out_hidden_size": 4096, "patch_size": 16, "deepstack_visual_indexes": [8, 16, 24]},
        "mrope_section": [24, 20, 20],
    },
}  # fmt: skip
TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
CASES = ("pictures", "text", "transformers' Trainer")
WARM_UP = 3


def config_of(args: argparse.Namespace) -> Any:
    from transformers import AutoConfig

    from tests.vlm.families import QWEN, TEXT
    from tests.vlm.families import config_of as tiny

    if args.tiny:
        return tiny(args.family)
    shape = SHAPES[args.family]
    ids = {key: TEXT[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": shape["mrope_section"]}
    text = {**shape["text_config"], **ids, "rope_parameters": rope, "max_position_embeddings": 32768}
    return AutoConfig.for_model(args.family, text_config=text, vision_config=shape["vision_config"], **QWEN)


def processor_of(args: argparse.Namespace) -> Any:
    """A processor with the model's patches, that leaves pictures as large as they are."""
    from tests.vlm.families import processor_of as tiny

    processor = tiny(args.family)
    if not args.tiny:
        patch = SHAPES[args.family]["vision_config"]["patch_size"]
        try:
            from transformers import Qwen2VLImageProcessor as Pictures
        except ImportError:
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Pictures
        size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 4096**2}
        processor.image_processor = Pictures(patch_size=patch, merge_size=2, temporal_patch_size=2, size=size)
    return processor


def model_of(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(device()):
        return AutoModelForImageTextToText.from_config(config_of(args), dtype=torch.bfloat16)


def write_data(folder: Path, args: argparse.Namespace, pictures: bool) -> Path:
    """Rows with one picture each and an answer; or rows of text with as many tokens."""
    from PIL import Image, ImageDraw

    draw = random.Random(0)
    file = folder / f"{'pictures' if pictures else 'text'}.jsonl"
    patch = config_of(args).vision_config.patch_size
    shown = (args.pixels // (2 * patch)) ** 2
    with file.open("w") as out:
        for index in range(args.samples):
            answer = "".join(draw.choice("abcdefghij klmnop ") for _ in range(args.answer))
            question = "What is in the picture?" if pictures else "q" * shown
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            row: dict[str, Any] = {"messages": turns}
            if pictures:
                row["image"] = f"{index % 64}.jpg"
                if index < 64:
                    image = Image.effect_noise((args.pixels, args.pixels), 80).convert("RGB")
                    pen = ImageDraw.Draw(image)
                    for _ in range(12):
                        corner = [draw.randrange(args.pixels // 2) for _ in range(2)]
                        pen.rectangle(
                            [*corner, corner[0] + 90, corner[1] + 60], fill=tuple(draw.choices(range(256), k=3))
                        )
                    image.save(folder / row["image"], quality=90)
            out.write(json.dumps(row) + "\n")
    return file


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """This project's Trainer."""
    from lightning.pytorch.callbacks import Callback

    from automodel_trainer import ImageTextDataModule, ImageTextModule, LoRAConfig, Trainer

    class Clock(Callback):
        def __init__(self) -> None:
            self.began = self.seconds = self.waited = 0.0
            self.tokens = self.ended = 0.0

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == WARM_UP:
                synchronize()
                self.began = self.ended = time.perf_counter()
            elif index > WARM_UP:
                self.waited += time.perf_counter() - self.ended
            if index >= WARM_UP:
                self.tokens += sum(micro["input_ids"].numel() for micro in batch)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index + 1 == args.steps:
                synchronize()
                self.seconds = time.perf_counter() - self.began
            self.ended = time.perf_counter()

    with tempfile.TemporaryDirectory() as name:
        folder, clock = Path(name), Clock()
        args.samples = 2 * args.steps * args.rows * (args.seq_len // min(args.seq_len, (args.pixels // 32) ** 2) + 1)
        file = write_data(folder, args, args.case == "pictures")
        data = ImageTextDataModule(
            str(file), seq_len=args.seq_len, micro_batch_size=1, global_batch_size=args.rows, num_workers=args.workers,
            cache=False,
        )  # fmt: skip
        module = ImageTextModule(model_of(args), processor=processor_of(args), lora=LoRAConfig(rank=16), lr=1e-4)
        trainer = Trainer(
            strategy="fsdp2", devices=1, precision="bf16", max_steps=args.steps, callbacks=[clock],
            enable_checkpointing=False, enable_progress_bar=False, logger=False, default_root_dir=folder,
            log_every_n_steps=args.steps,
        )  # fmt: skip
        trainer.fit(module, data)
        waited = clock.waited / clock.seconds
        return {
            "tokens_per_second": round(clock.tokens / clock.seconds, 1),
            "peak_gib": peak(),
            "loader_wait": f"{waited:.1%}",
            "loss": round(float(trainer.callback_metrics["train_loss"]), 3),
        }


def peer(args: argparse.Namespace) -> dict[str, Any]:
    """transformers' Trainer with PEFT: the same samples, as many in a batch as we pack into a row."""
    from peft import LoraConfig, get_peft_model
    from PIL import Image
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        began = seconds = 0.0

        def on_step_begin(self, a: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM_UP:
                synchronize()
                self.began = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.seconds = time.perf_counter() - self.began

    processor, config, clock = processor_of(args), config_of(args), Clock()
    patch = config.vision_config.patch_size
    args.per_row = max(1, args.seq_len // ((args.pixels // (2 * patch)) ** 2 + args.answer + 60))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args.samples = args.steps * args.rows * args.per_row
        rows = [json.loads(line) for line in write_data(folder, args, True).read_text().splitlines()]

        def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
            for row in batch:
                content = row["messages"][0]["content"]
                row["messages"][0]["content"] = (
                    [{"type": "image"}, {"type": "text", "text": content}] if isinstance(content, str) else content
                )
            texts = [processor.apply_chat_template(row["messages"], tokenize=False) for row in batch]
            images = [[Image.open(folder / row["image"]).convert("RGB")] for row in batch]
            made = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
            made["labels"] = made["input_ids"].masked_fill(made["input_ids"] == config.image_token_id, -100)
            return made

        model = model_of(args)
        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS), autocast_adapter_dtype=False
        )
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=args.steps, per_device_train_batch_size=args.per_row, bf16=True,
            gradient_accumulation_steps=args.rows, learning_rate=1e-4, report_to=[], save_strategy="no",
            dataloader_num_workers=args.workers, remove_unused_columns=False, logging_steps=args.steps,
            gradient_checkpointing=False, use_cpu=device() == "cpu",
        )  # fmt: skip
        Trainer(model, arguments, collate, rows, callbacks=[clock]).train()
        length = len(collate(rows[:1])["input_ids"][0])
        tokens = length * args.per_row * args.rows * (args.steps - WARM_UP)
        return {"tokens_per_second": round(tokens / clock.seconds, 1), "peak_gib": peak()}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def peak() -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0.0


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--family", choices=SHAPES, default="qwen2_5_vl")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2, help="rows of an optimizer step")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--pixels", type=int, default=1024, help="on each side of a picture")
    parser.add_argument("--answer", type=int, default=200, help="tokens")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--timeout", type=int, default=200)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.case:
        report((ours if args.case in CASES[:2] else peer)(args))
        return
    results: dict[str, Any] = {}
    for case in args.cases:
        passed = [a for a in sys.argv[1:] if a not in ("--cases", *args.cases)]
        found = result_of(__file__, ["--case", case, *passed], args.timeout)
        if isinstance(found, str):
            print(case, found, flush=True)
            continue
        results[case] = found
        print(args.family, case, json.dumps(found), flush=True)
    for case in results:
        if case != "pictures" and "pictures" in results:
            ratio = results["pictures"]["tokens_per_second"] / results[case]["tokens_per_second"]
            print(f"pictures / {case}: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
