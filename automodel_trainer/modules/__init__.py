"""Training objectives, each a LightningModule."""

from automodel_trainer.modules.causal_lm import CausalLMModule
from automodel_trainer.modules.optim import OptimizerConfig, SchedulerConfig

__all__ = ["CausalLMModule", "OptimizerConfig", "SchedulerConfig"]
