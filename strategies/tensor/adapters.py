"""Shard low-rank adapters to match their base weights."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import Shard

from automodel_trainer.distributed._dtensor import StridedShard
from automodel_trainer.models.lora.layers import Adapter, adapters
from automodel_trainer.models.quantization.quantize import is_to_be_quantized
from automodel_trainer.strategies.tensor.plan import TensorPlan


def cut_adapters(model: nn.Module, plan: TensorPlan) -> None:
    """Add the adapters of `model` to its plan.

    Of an update B·A, one factor is cut along the same side as the base weight. The other is replicated, and each rank
    computes a part of its gradient. The sum over ranks at the base layer includes the update.

    Args:
        plan: the model's plan; its `placements` and `summed` grow.

    Raises:
        ValueError: the plan cuts a quantized weight, or DoRA would need a sum over ranks in every step.
    """
    _refuse_quantized(model, plan)
    for adapter in adapters(model):
        weight = adapter.module._parameters[adapter.parameter]
        cut = plan.placements.get(id(weight))
        if weight is None or cut is None:
            continue
        columns = cut.dim == _outputs(adapter, weight.ndim)  # type: ignore[attr-defined]
        _refuse(adapter, columns)
        packed = getattr(cut, "split_factor", None)  # gate and up fused: a part of each half
        dim = 0 if columns else 1
        side = StridedShard(dim, split_factor=packed) if packed else Shard(dim)
        if columns:
            plan.placements[id(adapter.b.weight)] = side
            plan.summed.add(id(adapter.a.weight))
            if adapter.magnitude is not None:
                plan.placements[id(adapter.magnitude)] = Shard(0)
        else:
            plan.placements[id(adapter.a.weight)] = side
            plan.summed.add(id(adapter.b.weight))


def _outputs(adapter: Adapter, ndim: int) -> int:
    """The output dimension of the base weight: of `[out, in]`, `[e, out, in]` or, if transposed, `[(e,) in, out]`."""
    transposed = adapter.is_transposed or (getattr(adapter.module, "is_transposed", False) and ndim == 3)
    return ndim - 1 if transposed else ndim - 2


def _refuse_quantized(model: nn.Module, plan: TensorPlan) -> None:
    for name, module in model.named_modules():
        for key, weight in module.named_parameters(recurse=False):
            if id(weight) in plan.placements and is_to_be_quantized(module, key):
                raise ValueError(
                    f"The {key} of {name} is held quantized (lora quantize, or kernels fp8), and tensor parallel "
                    "cannot cut it. Set tp=1. Experts may be split by ep instead."
                )


def _refuse(adapter: Adapter, columns: bool) -> None:
    """Refuse adapters that cannot be cut; `columns`: the base weight is cut along its outputs."""
    if adapter.magnitude is not None and not columns:
        raise ValueError(
            f"lora use_dora: under tensor parallel the norm of {adapter.target}'s rows would need a sum over ranks in "
            "every step, which is not supported. Set use_dora=False, exclude this layer, or set tp=1."
        )
