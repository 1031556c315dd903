"""Cut low-rank adapters as their base weights are cut."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import Shard

from automodel_trainer.distributed._dtensor import StridedShard
from automodel_trainer.models.lora.layers import Adapter, adapters
from automodel_trainer.models.quantization.quantize import is_to_be_quantized
from automodel_trainer.strategies.tensor.plan import TensorPlan


def cut_adapters(model: nn.Module, plan: TensorPlan) -> None:
    """Add the adapters of `model` to its plan.

    Of B·A, the factor on the side that is cut is cut along with the base, and the other one is replicated: each rank
    then computes a part of that one's gradient. The base layer's own sum takes the update along.

    Raises:
        ValueError: an adapter that cannot be cut.
    """
    for adapter in adapters(model):
        weight = adapter.module._parameters[adapter.parameter]
        cut = plan.placements.get(id(weight))
        if weight is None or cut is None:
            continue
        _refuse(adapter, cut.dim == _outputs(adapter, weight.ndim))  # type: ignore[attr-defined]
        if cut.dim == _outputs(adapter, weight.ndim):  # type: ignore[attr-defined]
            packed = getattr(cut, "split_factor", None)
            side = StridedShard(0, split_factor=packed) if packed else Shard(0)
            plan.placements[id(adapter.b.weight)] = side
            plan.summed.add(id(adapter.a.weight))
            if adapter.magnitude is not None:
                plan.placements[id(adapter.magnitude)] = Shard(0)
        else:
            plan.placements[id(adapter.a.weight)] = Shard(1)
            plan.summed.add(id(adapter.b.weight))


def _outputs(adapter: Adapter, ndim: int) -> int:
    """The dimension of the base weight that holds its outputs."""
    return ndim - 1 if getattr(adapter.module, "is_transposed", False) and ndim == 3 else ndim - 2


def _refuse(adapter: Adapter, columns: bool) -> None:
    if is_to_be_quantized(adapter.module, adapter.parameter):
        raise ValueError(
            f"The weight of {adapter.target} is held quantized (lora quantize, or kernels fp8), and tensor parallel "
            "cannot cut it. Set tp=1."
        )
    if adapter.magnitude is not None and not columns:
        raise ValueError(
            f"lora use_dora: the norm of {adapter.target}'s rows would have to be summed over the ranks of tensor "
            "parallel in every step, which is not offered. Set use_dora=False, exclude this layer, or set tp=1."
        )
