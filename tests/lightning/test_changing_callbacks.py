"""Lightning's callbacks that freeze, unfreeze and prune weights of an objective, under every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, Callback, ModelPruning
from lightning.pytorch.demos.boring_classes import BoringModel

from automodel_trainer import CausalLMModule, MockDataModule
from automodel_trainer.callbacks import DCPCheckpoint
from tests.lightning.boring import WHOLE_EPOCHS, make
from tests.pool import RankPool
from tests.tiny import tiny_model

EPOCHS = 3


class FirstBlockLater(BaseFinetuning):
    """Freezes the first block until the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model.model.layers[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.model.layers[0], optimizer, lr=5e-3)


class Weights(Callback):
    """Keeps the weights at the start of each epoch and at the end."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        named = pl_module.model.named_parameters()
        self.seen.append({name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in named})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.on_train_epoch_start(trainer, pl_module)


def fit(root: Path, strategy: str, callback: Callback, epochs: int = EPOCHS, ckpt: Any = None) -> Any:
    kept = Weights()
    callbacks = [kept, callback, DCPCheckpoint(filename="{epoch}")]
    options = {"strategy": strategy, "devices": "auto", "max_epochs": epochs, "callbacks": callbacks}
    trainer = make(root, **options, **WHOLE_EPOCHS)
    module = CausalLMModule(tiny_model(), lr=1e-2, scheduler={"name": "constant", "warmup_steps": 2})
    data = MockDataModule(264, seq_len=16, micro_batch_size=1, global_batch_size=4, num_samples=16)
    return kept.seen, trainer.fit(module, data, ckpt_path=ckpt), trainer


def unfrozen(root: str, strategy: str) -> tuple[list[dict[str, torch.Tensor]], float]:
    """Weights by epoch, and the distance of a run that was resumed after the second epoch."""
    seen, _, trainer = fit(Path(root) / "a", strategy, FirstBlockLater())
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == [1e-2] * (len(rates) - 1) + [5e-3], "the new group follows the schedule from its own rate"
    _, path, _ = fit(Path(root) / "b", strategy, FirstBlockLater(), 2)
    resumed, _, _ = fit(Path(root) / "b", strategy, FirstBlockLater(), ckpt=path)
    return seen, max(float((resumed[-1][name] - seen[-1][name]).abs().max()) for name in seen[-1])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "hsdp:dp_replicate=2"])
def test_a_block_is_frozen_and_trained_later(pool: RankPool, tmp_path: Path, strategy: str) -> None:
    one, resumed = unfrozen(str(tmp_path / "one"), "ddp")
    assert resumed == 0.0
    for seen, resumed in pool.run(2, unfrozen, str(tmp_path / "two"), strategy):
        assert resumed == 0.0
        for name in one[-1]:
            still = torch.equal(seen[0][name], seen[1][name])
            assert still is name.startswith("model.layers.0."), name
            assert not torch.equal(seen[1][name], seen[2][name]), name
            torch.testing.assert_close(seen[-1][name], one[-1][name], rtol=0, atol=2e-4)


class Two(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(32, 32)

    def forward(self, x: Any) -> Any:
        return self.layer(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def own_backbone(root: str, strategy: str) -> torch.Tensor:
    """The backbone of a user's module after three epochs; it is trained from the second on, on other rows each rank."""
    torch.manual_seed(0)
    module = Two()
    thaws = BackboneFinetuning(1, lambda epoch: 1.0, backbone_initial_lr=1e-2)
    options = {"strategy": strategy, "devices": "auto", "max_epochs": EPOCHS, "callbacks": [thaws]}
    trainer = make(root, enable_checkpointing=False, **options, **WHOLE_EPOCHS)
    rows = torch.utils.data.DataLoader(torch.randn(8, 32, generator=torch.Generator().manual_seed(1)), batch_size=1)
    trainer.fit(module, rows)
    weight = module.backbone.weight.detach()
    return getattr(weight, "full_tensor", lambda: weight)().clone()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_backbone_of_a_users_module(pool: RankPool, tmp_path: Path, strategy: str) -> None:
    """Ranks have other rows, so a backbone whose gradients nobody reduces would differ between them."""
    one, other = pool.run(2, own_backbone, str(tmp_path), strategy)
    assert torch.equal(one, other)
    torch.manual_seed(0)
    assert not torch.equal(one, Two().backbone.weight)


def pruned(root: str, strategy: str) -> str:
    try:
        seen, _, _ = fit(Path(root), strategy, ModelPruning("l1_unstructured", amount=0.5))
    except ValueError as error:
        return str(error)
    masks = [value for name, value in seen[-1].items() if name.endswith("weight_orig")]
    return f"{len(masks) > 0}"


def test_pruning(pool: RankPool, tmp_path: Path) -> None:
    assert pruned(str(tmp_path / "one"), "ddp") == "True"
    assert all("strategy='ddp'" in found for found in pool.run(2, pruned, str(tmp_path / "two"), "fsdp2"))
