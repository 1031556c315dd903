"""Train any Hugging Face model on any layout of devices, behind Lightning's Trainer.

Names are imported when they are first used: `import automodel_trainer` alone is cheap.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

from automodel_trainer._fork_safe import leave_cuda_alone
from automodel_trainer.imports import importing

if TYPE_CHECKING:
    from automodel_trainer.auto import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        add_lora,
    )
    from automodel_trainer.checkpoint import load_checkpoint, save_checkpoint
    from automodel_trainer.checkpoint.stream import stream_weights, weight_info
    from automodel_trainer.data import (
        ChatDataModule,
        ImageTextDataModule,
        MockDataModule,
        TextDataModule,
        TokenDataModule,
    )
    from automodel_trainer.data.chat_template import encode_conversation as encode_chat
    from automodel_trainer.data.packing import pack
    from automodel_trainer.models.kernels import KernelsConfig
    from automodel_trainer.models.lora import LoRAConfig
    from automodel_trainer.modules import (
        BalanceConfig,
        CausalLMModule,
        HuggingFaceModule,
        ImageTextModule,
        OptimizerConfig,
        SchedulerConfig,
    )
    from automodel_trainer.modules.chunked_loss import chunked_loss
    from automodel_trainer.strategies import (
        DDPStrategy,
        FaultTolerantStrategy,
        FSDP2Strategy,
        MegatronFSDPStrategy,
        MeshStrategy,
        StrategyRegistry,
    )
    from automodel_trainer.strategies.base.clip import clip_grad_norm_
    from automodel_trainer.trainer import Trainer

leave_cuda_alone()  # before transformers, which a name of this package may import

_HOMES = {
    "AutoModel": "auto",
    "AutoModelForCausalLM": "auto",
    "AutoModelForImageTextToText": "auto",
    "AutoModelForSequenceClassification": "auto",
    "AutoModelForTokenClassification": "auto",
    "BalanceConfig": "modules",
    "CausalLMModule": "modules",
    "ChatDataModule": "data",
    "DDPStrategy": "strategies",
    "FSDP2Strategy": "strategies",
    "FaultTolerantStrategy": "strategies",
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
    "add_lora": "auto",
    "chunked_loss": "modules.chunked_loss",
    "clip_grad_norm_": "strategies.base.clip",
    "encode_chat": "data.chat_template:encode_conversation",
    "load_checkpoint": "checkpoint",
    "pack": "data.packing",
    "save_checkpoint": "checkpoint",
    "stream_weights": "checkpoint.stream",
    "weight_info": "checkpoint.stream",
}

__all__ = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "BalanceConfig",
    "CausalLMModule",
    "ChatDataModule",
    "DDPStrategy",
    "FSDP2Strategy",
    "FaultTolerantStrategy",
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
    "add_lora",
    "chunked_loss",
    "clip_grad_norm_",
    "encode_chat",
    "load_checkpoint",
    "pack",
    "save_checkpoint",
    "stream_weights",
    "weight_info",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, _, known_as = _HOMES[name].partition(":")
    file = f"{__name__}.{home}"
    with nullcontext() if file in sys.modules else importing():  # a parser asks for each name a hundred times
        module = import_module(file)
    return getattr(module, known_as or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
