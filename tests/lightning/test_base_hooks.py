"""Hooks of a subclass of an objective that do not call `super()`, which Lightning's users need not."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from automodel_trainer import CausalLMModule, MockDataModule, Trainer
from automodel_trainer.callbacks import DCPCheckpoint
from tests.lightning.boring import WHOLE_EPOCHS, make
from tests.tiny import tiny_model, tiny_tokenizer


class Bare(CausalLMModule):
    """Overrides hooks as Lightning's documentation does."""

    def on_validation_epoch_start(self) -> None:
        self.validations = getattr(self, "validations", 0) + 1

    def on_validation_epoch_end(self) -> None:
        self.log("mine", float(self.validations))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = self.validations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.validations = checkpoint["mine"]

    def on_train_end(self) -> None:
        self.ended = True


class Again(Bare):
    def on_validation_epoch_end(self) -> None:
        self.log("again", 1.0)


def fit(root: Path, kind: type[CausalLMModule], epochs: int = 2, ckpt: Any = None) -> tuple[Any, Trainer, Any]:
    trainer = make(root, max_epochs=epochs, callbacks=[DCPCheckpoint()], num_sanity_val_steps=2, **WHOLE_EPOCHS)
    module = kind(tiny_model(), tokenizer=tiny_tokenizer(), lr=1e-2)
    data = MockDataModule(264, seq_len=16, global_batch_size=4, num_samples=16, val_samples=4)
    path = trainer.fit(module, data, ckpt_path=ckpt)
    return module, trainer, path


@pytest.mark.parametrize("kind", [Bare, Again])
def test_the_base_does_its_work(tmp_path: Path, kind: type[CausalLMModule]) -> None:
    _, plain, _ = fit(tmp_path / "plain", CausalLMModule)
    module, trainer, path = fit(tmp_path / "own", kind)
    assert trainer.callback_metrics["val_loss"] == plain.callback_metrics["val_loss"], "of one epoch, not of all"
    assert trainer.callback_metrics["mine"] == module.validations == 3  # with the first look
    assert module.ended
    assert (path / "model" / "tokenizer.json").is_file()
    resumed, _, _ = fit(tmp_path / "own", kind, 3, path)
    assert resumed.validations >= 4


def test_hooks_that_call_their_base_are_left_alone() -> None:
    def logged(hook: Any) -> Any:
        @functools.wraps(hook)
        def wrapper(self: Any) -> None:
            hook(self)

        return wrapper

    class Own(CausalLMModule):
        def on_train_end(self) -> None:
            super().on_train_end()

        @logged
        def on_validation_epoch_start(self) -> None:
            CausalLMModule.on_validation_epoch_start(self)

        def on_after_backward(self) -> None: ...  # Lightning's, which does nothing

    for name in ("on_train_end", "on_validation_epoch_start", "on_after_backward"):
        assert not hasattr(getattr(Own, name), "_keeps_base"), name


def test_a_step_of_its_own_logs_its_own_numbers(tmp_path: Path) -> None:
    """Metrics that have counted nothing would be NaN, and hide them."""

    class Fixed(CausalLMModule):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", 1.5)

    class Both(CausalLMModule):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx, dataloader_idx)
            self.log("val_batches", 1.0, reduce_fx="sum")

    _, trainer, _ = fit(tmp_path / "fixed", Fixed)
    assert float(trainer.callback_metrics["val_loss"]) == 1.5
    assert "val_perplexity" not in trainer.callback_metrics
    _, plain, _ = fit(tmp_path / "plain", CausalLMModule)
    _, both, _ = fit(tmp_path / "both", Both)
    assert both.callback_metrics["val_loss"] == plain.callback_metrics["val_loss"]
    assert float(both.callback_metrics["val_batches"]) == 4
