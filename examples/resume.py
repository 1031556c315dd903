"""Stop, and go on with another learning rate and length: `python examples/resume.py org/name chats.jsonl`."""

import sys

from automodel_trainer import CausalLMModule, ChatDataModule, Trainer
from automodel_trainer.callbacks import DCPCheckpoint


def train(model: str, data: str, steps: int, **go_on: str) -> Trainer:
    rate = 2e-5 if go_on else 1e-4
    trainer = Trainer(
        max_steps=steps,
        strategy="ddp" if go_on else "fsdp2",  # a checkpoint fits every layout
        callbacks=[DCPCheckpoint(every_n_steps=steps)],
        default_root_dir="runs/resume",
    )
    module = CausalLMModule(model, lr=rate, scheduler="constant")
    trainer.fit(module, ChatDataModule(data, seq_len=256, micro_batch_size=2, global_batch_size=4), **go_on)
    return trainer


def main(model: str, data: str, steps: int = 50) -> None:
    train(model, data, steps)
    again = train(model, data, 2 * steps, ckpt_path="last")  # the next rows, not the first ones
    print(f"step {again.global_step}, from {again.ckpt_path or 'the checkpoint'}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
