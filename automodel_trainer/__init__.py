"""Train any Hugging Face model on any layout of devices, behind Lightning's Trainer.

Names are imported when they are first used: `import automodel_trainer` alone is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from automodel_trainer.data import (
        ChatDataModule,
        ImageTextDataModule,
        MockDataModule,
        TextDataModule,
        TokenDataModule,
    )
    from automodel_trainer.models import AutoModelForCausalLM, AutoModelForImageTextToText
    from automodel_trainer.models.kernels import KernelsConfig
    from automodel_trainer.models.lora import LoRAConfig
    from automodel_trainer.modules import (
        CausalLMModule,
        HuggingFaceModule,
        ImageTextModule,
        OptimizerConfig,
        SchedulerConfig,
    )
    from automodel_trainer.strategies import (
        DDPStrategy,
        FSDP2Strategy,
        MegatronFSDPStrategy,
        MeshStrategy,
        StrategyRegistry,
    )
    from automodel_trainer.trainer import Trainer

_HOMES = {
    "AutoModelForCausalLM": "models",
    "AutoModelForImageTextToText": "models",
    "CausalLMModule": "modules",
    "ChatDataModule": "data",
    "DDPStrategy": "strategies",
    "FSDP2Strategy": "strategies",
    "HuggingFaceModule": "modules",
    "ImageTextDataModule": "data",
    "ImageTextModule": "modules",
    "KernelsConfig": "models.kernels",
    "LoRAConfig": "models.lora",
    "MegatronFSDPStrategy": "strategies",
    "MeshStrategy": "strategies",
    "MockDataModule": "data",
    "OptimizerConfig": "modules",
    "SchedulerConfig": "modules",
    "StrategyRegistry": "strategies",
    "TextDataModule": "data",
    "TokenDataModule": "data",
    "Trainer": "trainer",
}

__all__ = [
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "CausalLMModule",
    "ChatDataModule",
    "DDPStrategy",
    "FSDP2Strategy",
    "HuggingFaceModule",
    "ImageTextDataModule",
    "ImageTextModule",
    "KernelsConfig",
    "LoRAConfig",
    "MegatronFSDPStrategy",
    "MeshStrategy",
    "MockDataModule",
    "OptimizerConfig",
    "SchedulerConfig",
    "StrategyRegistry",
    "TextDataModule",
    "TokenDataModule",
    "Trainer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
