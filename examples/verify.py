"""Compare a layout with one device: `python examples/verify.py org/name chats.jsonl fsdp2:tp=2`.

It takes seconds and no GPU: a small copy of the model trains three steps both ways.
"""

import sys

from automodel_trainer import CausalLMModule, ChatDataModule, Trainer


def main(model: str, data: str, layout: str = "fsdp2:tp=2") -> None:
    module = CausalLMModule(model)
    report = Trainer(strategy=layout, logger=False).verify(
        module, ChatDataModule(data, seq_len=128, micro_batch_size=2)
    )
    report.print()
    if not report.passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
