"""Training objectives, each a LightningModule.

`hugging_face.py` is the base of them: the training step, optimizer and checkpoint state. Below it, `evaluation.py` has
validation and predictions, and `built.py` builds the model. An objective is a subclass; `causal_lm.py` is the default.
"""

from automodel_trainer.modules.causal_lm import CausalLMModule
from automodel_trainer.modules.hugging_face import HuggingFaceModule
from automodel_trainer.modules.optim import OptimizerConfig, SchedulerConfig

DEFAULT_OBJECTIVE = CausalLMModule
"""What a model is trained on that is given as a string or a `PreTrainedModel`."""

__all__ = ["DEFAULT_OBJECTIVE", "CausalLMModule", "HuggingFaceModule", "OptimizerConfig", "SchedulerConfig"]
