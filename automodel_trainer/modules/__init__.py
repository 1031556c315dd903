"""Training objectives, each a LightningModule.

`hugging_face.py` is their base class: the training step, the optimizer and the checkpoint state. Its own base classes
are in `evaluation.py` (validation and predictions) and `built.py` (building the model). An objective is a subclass;
`causal_lm.py` is the default.
"""

from automodel_trainer.modules.causal_lm import CausalLMModule
from automodel_trainer.modules.hugging_face import HuggingFaceModule
from automodel_trainer.modules.optim import OptimizerConfig, SchedulerConfig

DEFAULT_OBJECTIVE = CausalLMModule
"""The objective of a model that is given to `fit` as a string or a `PreTrainedModel`."""

__all__ = ["DEFAULT_OBJECTIVE", "CausalLMModule", "HuggingFaceModule", "OptimizerConfig", "SchedulerConfig"]
