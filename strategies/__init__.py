"""How a model is laid out on devices. Imported as `automodel_trainer.strategies`."""

from automodel_trainer.strategies.base import MeshStrategy, Objective
from automodel_trainer.strategies.ddp import DDPStrategy
from automodel_trainer.strategies.fsdp2 import FSDP2Strategy
from automodel_trainer.strategies.megatron_fsdp import MegatronFSDPStrategy
from automodel_trainer.strategies.mesh import ParallelDims
from automodel_trainer.strategies.parallel_3d import Parallel3DStrategy
from automodel_trainer.strategies.registry import StrategyRegistry

__all__ = [
    "DDPStrategy",
    "FSDP2Strategy",
    "MegatronFSDPStrategy",
    "MeshStrategy",
    "Objective",
    "Parallel3DStrategy",
    "ParallelDims",
    "StrategyRegistry",
]
