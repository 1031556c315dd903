"""A LightningModule of your own around a Hugging Face model: `python examples/lightning_module.py org/name`."""

import sys

import lightning.pytorch as pl
import torch
import transformers

from automodel_trainer import Trainer


class Regression(pl.LightningModule):
    """Predicts the mean of the token ids of a row from the hidden state of its last token."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.backbone = transformers.AutoModel.from_pretrained(model, dtype=torch.float32)
        self.head = torch.nn.Linear(self.backbone.config.hidden_size, 1)

    def training_step(self, ids, batch_idx):
        hidden = self.backbone(input_ids=ids).last_hidden_state[:, -1]
        loss = (self.head(hidden).squeeze(-1) - ids.float().mean(1) / 100).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(model: str, steps: int = 100) -> None:
    ids = torch.randint(6, 200, (64, 16), generator=torch.Generator().manual_seed(0))
    rows = torch.utils.data.DataLoader(ids, batch_size=4, shuffle=True)
    trainer = Trainer(strategy="fsdp2", max_steps=steps, default_root_dir="runs/lightning_module")
    trainer.fit(Regression(model), rows)
    print(trainer.callback_metrics["train_loss"])


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
