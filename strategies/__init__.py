"""How a model is laid out on devices. Imported as `automodel_trainer.strategies`.

Each folder holds one parallelism that works without a Trainer; `base/` holds the contract that all strategies share.
"""

from automodel_trainer.distributed.mesh import ParallelDims
from automodel_trainer.strategies.base.mesh_strategy import MeshStrategy
from automodel_trainer.strategies.base.objective import Objective
from automodel_trainer.strategies.data_parallel.ddp import DDPStrategy
from automodel_trainer.strategies.data_parallel.fsdp2 import FSDP2Strategy
from automodel_trainer.strategies.fault_tolerant.strategy import FaultTolerantStrategy
from automodel_trainer.strategies.megatron.megatron_fsdp import MegatronFSDPStrategy
from automodel_trainer.strategies.pipeline.parallel_3d import Parallel3DStrategy
from automodel_trainer.strategies.registry import StrategyRegistry

__all__ = [
    "DDPStrategy",
    "FSDP2Strategy",
    "FaultTolerantStrategy",
    "MegatronFSDPStrategy",
    "MeshStrategy",
    "Objective",
    "Parallel3DStrategy",
    "ParallelDims",
    "StrategyRegistry",
]
