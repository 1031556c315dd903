"""Rows from memory, with column names of your own: `python examples/own_rows.py org/name`."""

import sys

import datasets

from automodel_trainer import CausalLMModule, ChatDataModule, Trainer


def main(model: str, steps: int = 100) -> None:
    rows = datasets.Dataset.from_list(
        [{"ask": f"What is {a} plus {b}?", "reply": str(a + b)} for a in range(10) for b in range(10)]
    )
    data = ChatDataModule(
        rows,
        columns={"prompt": "ask", "completion": "reply"},  # known name -> yours
        val_split=0.1,
        seq_len=256,
        micro_batch_size=2,
        global_batch_size=8,
    )
    trainer = Trainer(max_steps=steps, log_every_n_steps=2, val_check_interval=0.5, default_root_dir="runs/own_rows")
    trainer.fit(CausalLMModule(model, lr=2e-5), data)
    print(trainer.callback_metrics["train_loss"])


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
