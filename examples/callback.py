"""A callback of your own: stop when the loss is low enough. `python examples/callback.py org/name chats.jsonl`.

`examples/callback.yaml` names the same class for `amt fit`.
"""

import sys

from lightning.pytorch import Callback

from automodel_trainer import CausalLMModule, ChatDataModule, Trainer


class StopWhenGood(Callback):
    """Ends training when the mean loss of the last log step is below `loss`.

    Args:
        loss: of a step, as it is logged.
    """

    def __init__(self, loss: float = 0.5) -> None:
        self.loss = loss
        self.stopped_at: int | None = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        logged = trainer.callback_metrics.get("train_loss")  # a log step has waited for the device already
        if logged is not None and trainer.global_step % trainer.log_every_n_steps == 0 and logged < self.loss:
            self.stopped_at = trainer.global_step
            trainer.should_stop = True


def main(model: str, data: str, steps: int = 100, loss: float = 0.5) -> None:
    stop = StopWhenGood(loss)
    trainer = Trainer(max_steps=steps, log_every_n_steps=1, callbacks=[stop], default_root_dir="runs/callback")
    trainer.fit(CausalLMModule(model, lr=1e-3), ChatDataModule(data, seq_len=256, micro_batch_size=2))
    print(f"stopped at step {stop.stopped_at}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]), *map(float, sys.argv[4:]))
