"""Which accelerator a Trainer uses where the strategies of this project cannot run on the one that Lightning finds."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from automodel_trainer.strategies import MeshStrategy, StrategyRegistry


def resolve_devices(accelerator: Any, strategy: str | Strategy) -> tuple[Any, str | Strategy]:
    """The accelerator to use, and the strategy as an object or as one of Lightning's names.

    On a Mac, `accelerator="auto"` is the CPU with a warning: the strategies of this project need collectives, which MPS
    does not have. `accelerator="mps"` with the default strategy is Lightning's own strategy for one device.

    Raises:
        ValueError: a strategy of this project was asked for on MPS, or the strategy is unknown.
    """
    mps = isinstance(accelerator, MPSAccelerator) or accelerator in ("mps", "gpu", "auto", None)
    if not mps or not MPSAccelerator.is_available():
        return accelerator, StrategyRegistry.resolve(strategy)
    if accelerator not in ("auto", None) and strategy == "auto":
        return accelerator, "auto"
    resolved = StrategyRegistry.resolve(strategy)
    if not isinstance(resolved, MeshStrategy):
        return accelerator, resolved
    if accelerator not in ("auto", None):
        raise ValueError(
            f"strategy={strategy!r} does not run on MPS. Leave strategy out to train a LightningModule of your own on "
            "MPS, or use accelerator='cpu'."
        )
    rank_zero_warn(
        "The CPU is used, not MPS: the strategies that train Hugging Face models do not run on MPS. Give "
        "accelerator='cpu' to say so yourself, or accelerator='mps' to train a LightningModule of your own."
    )
    return "cpu", resolved
