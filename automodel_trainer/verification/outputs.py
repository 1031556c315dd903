"""Records the output of every module of a model in forward order, on any layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from automodel_trainer.models.stage_names import modules_around_layers
from automodel_trainer.nn.deferred_logits import DeferredLogits
from automodel_trainer.strategies import MeshStrategy


class OutputRecorder:
    """Keeps the first tensor of every module's output during the model's next `forwards` forward passes.

    In a pipeline, a forward means the forward of the rank's first stage, and only modules inside of it are recorded.

    Attributes:
        outputs: for each forward, the tensors by module name, in the order in which the modules finished.
    """

    def __init__(self, model: nn.Module, forwards: int = 1) -> None:
        self.outputs: list[dict[str, Tensor]] = [{}]
        self._left = forwards
        around = modules_around_layers(model)
        self._whole = not around
        self._handles = [
            module.register_forward_hook(lambda m, args, output, name=name: self._record(name, output))
            for name, module in model.named_modules()
            if name and name not in around
        ]
        self._handles.append(model.register_forward_hook(lambda m, args, output: self._end(output)))

    def _record(self, name: str, output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is not None and tensor.is_floating_point() and tensor.ndim >= 2:
            self.outputs[-1].setdefault(name, tensor.detach().clone())

    def _end(self, output: Any) -> None:
        if self._whole:
            self._record("(model)", output)
        self._left -= 1
        if self._left:
            self.outputs.append({})
            return
        for handle in self._handles:  # now, before backward: recomputed modules would be recorded again
            handle.remove()


def _first_tensor(output: Any) -> Tensor | None:
    output = output if getattr(output, "logits", None) is None else output.logits
    if isinstance(output, DeferredLogits):
        output = output.whole()
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def whole_output(local: Tensor, shape: torch.Size, strategy: MeshStrategy) -> Tensor | None:
    """The whole output of which a rank holds a part: sequence shards are gathered in order. Collective.

    Args:
        local: this rank's output, `[b, s/n, h]` if it is a part.
        shape: of the output on one device.
        strategy: the layout.

    Returns:
        a tensor of `shape`; None if the parts cannot be joined, as for the inner features of a layer that tensor
        parallel cuts. The output of the module around it shows the same errors.
    """
    if isinstance(local, DTensor):
        local = local.full_tensor()
    if local.ndim != 3 or len(shape) != 3:  # not [rows, tokens, features]
        return local if local.shape == shape else None
    dims, length = strategy.dims, shape[1]
    part = -(-length // dims.cp)
    if dims.tp > 1 and local.shape[1] < part:
        local = _gather(local, strategy.device_mesh["tp"].get_group())
    if dims.cp > 1 and local.shape[1] < length:
        local = strategy.gather_sequence(local, length)
    return local[:, :length] if local[:, :length].shape == shape else None


def _gather(local: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=1)
