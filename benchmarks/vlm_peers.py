"""transformers' Trainer and Unsloth on the rows of `vlm.py`. Nothing of ours is imported here."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peer import unsloth_vision_model
from vlm_data import WARM_UP, config_of, device, model_of, peak, processor_of, synchronize, write_data

TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def samples_of(args: argparse.Namespace, folder: Path, steps: int) -> list[dict[str, Any]]:
    """The rows of so many steps: as many in a batch as we pack into a row."""
    shown = (args.pixels // (2 * config_of(args).vision_config.patch_size)) ** 2
    args.per_row = max(1, args.seq_len // (shown + args.answer + 60))
    args.samples = steps * args.rows * args.per_row
    return [json.loads(line) for line in write_data(folder, args).read_text().splitlines()]


def collator(args: argparse.Namespace, folder: Path) -> Any:
    """Makes a padded batch of rows with pictures."""
    from PIL import Image

    processor, config = processor_of(args, films=False), config_of(args)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        chats = []
        for question, answer in (row["messages"] for row in rows):
            content = [{"type": "image"}, {"type": "text", "text": question["content"]}]
            chats.append([{"role": "user", "content": content}, answer])
        texts = [processor.apply_chat_template(chat, tokenize=False) for chat in chats]
        images = [[Image.open(folder / row["image"]).convert("RGB")] for row in rows]
        made = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
        made["labels"] = made["input_ids"].masked_fill(made["input_ids"] == config.image_token_id, -100)
        return made

    return collate


def transformers_trainer(args: argparse.Namespace) -> dict[str, Any]:
    """transformers' Trainer with PEFT."""
    from peft import LoraConfig, get_peft_model
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

    clock, model = Clock(), model_of(args)
    if args.whole:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("visual" not in name)
    else:
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    with tempfile.TemporaryDirectory() as name:
        rows, collate = samples_of(args, Path(name), args.steps), collator(args, Path(name))
        arguments = TrainingArguments(
            output_dir=name, max_steps=args.steps, per_device_train_batch_size=args.per_row, bf16=True,
            gradient_accumulation_steps=args.rows, learning_rate=1e-5 if args.whole else 1e-4, report_to=[],
            save_strategy="no", dataloader_num_workers=args.workers, remove_unused_columns=False,
            logging_steps=args.steps, gradient_checkpointing=False, use_cpu=device() == "cpu",
        )  # fmt: skip
        Trainer(model, arguments, collate, rows, callbacks=[clock]).train()
        length = len(collate(rows[:1])["input_ids"][0])
    tokens = length * args.per_row * args.rows * (args.steps - WARM_UP)
    return {"tokens_per_second": round(tokens / clock.seconds, 1), "peak_gib": peak()}


def save_for_unsloth(args: argparse.Namespace) -> dict[str, Any]:
    """The model and a few batches as files. Unsloth then waits for no loader."""
    target = Path(args.folder) / args.family
    if not (target / "config.json").exists():
        model_of(args).save_pretrained(target)
        processor_of(args, films=True).save_pretrained(target)  # nobody can load it without its part for videos
    with tempfile.TemporaryDirectory() as name:
        rows, collate = samples_of(args, Path(name), 2), collator(args, Path(name))
        batches = [collate(rows[first : first + args.per_row]) for first in range(0, len(rows), args.per_row)]
    torch.save(batches, target / "batches.pt")
    return {}


def unsloth(args: argparse.Namespace) -> dict[str, Any]:
    """Unsloth's model, without checkpointing, in a bare loop."""
    target = Path(args.folder) / args.family
    model = unsloth_vision_model(target, args.seq_len, whole=args.whole)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5 if args.whole else 1e-4, fused=True)
    batches = torch.load(target / "batches.pt")
    tokens = batches[0]["input_ids"].numel() * args.rows
    ends = [time.perf_counter()]
    loss = torch.zeros(())
    for step in range(args.steps):
        for part in range(args.rows):
            batch = batches[(step * args.rows + part) % len(batches)]
            loss = model(**{name: value.to(device()) for name, value in batch.items()}).loss
            (loss / args.rows).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        ends.append(time.perf_counter())
    seconds = statistics.median(after - before for before, after in pairwise(ends[WARM_UP:]))
    trainable = f"{sum(parameter.numel() for parameter in trained):,} {trained[0].dtype}"
    rate = round(tokens / seconds, 1)
    return {"tokens_per_second": rate, "peak_gib": peak(), "loss": round(float(loss), 3), "trained": trainable}
