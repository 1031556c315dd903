"""Training objectives, each a LightningModule.

`hugging_face.py` is their base class: the training step, the optimizer and the checkpoint state. Its own base classes
are in `evaluation.py` (validation and predictions) and `built.py` (building the model). An objective is a subclass;
`causal_lm.py` is the default, and `image_text.py` that of vision-language models (`objectives.py` chooses).
"""

from automodel_trainer.modules.balance import BalanceConfig
from automodel_trainer.modules.causal_lm import CausalLMModule
from automodel_trainer.modules.hugging_face import HuggingFaceModule
from automodel_trainer.modules.image_text import ImageTextModule
from automodel_trainer.modules.objectives import DEFAULT_OBJECTIVE, objective_named, objective_of
from automodel_trainer.modules.optim import OptimizerConfig, SchedulerConfig

__all__ = [
    "DEFAULT_OBJECTIVE",
    "BalanceConfig",
    "CausalLMModule",
    "HuggingFaceModule",
    "ImageTextModule",
    "OptimizerConfig",
    "SchedulerConfig",
    "objective_named",
    "objective_of",
]
