"""What `on_save_checkpoint` hooks made of the weights in `checkpoint["state_dict"]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from automodel_trainer.distributed._dtensor import local_tensor
from automodel_trainer.models.lora import lora_of
from automodel_trainer.models.lora.adapter_files import trained_tensors
from automodel_trainer.nn.text import listed
from automodel_trainer.nn.uneven import is_uneven


def check_tensors(edited: Mapping[str, Any]) -> None:
    """Raise ValueError if a hook left something else than tensors."""
    for name, value in edited.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"on_save_checkpoint set state_dict[{name!r}] to a {type(value).__name__}, not a tensor.")


def like(value: Any, target: Any) -> Any:
    """`value`, distributed like `target` if that is a DTensor and `value` a whole tensor of its shape.

    Raises:
        ValueError: `target` is sharded unevenly (Megatron-FSDP).
    """
    if not isinstance(target, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if is_uneven(target):
        raise ValueError(
            "This layout shards weights unevenly, so edited weights cannot be loaded into it. Use strategy='fsdp2', or "
            "leave checkpoint['state_dict'] as it is."
        )
    if value.shape != target.shape:
        return value  # load_state_dict names both shapes
    mesh = target.device_mesh
    on_mesh = value.to(mesh.device_type, target.dtype)
    return distribute_tensor(on_mesh, mesh, target.placements).to(target.device)


@contextmanager
@torch.no_grad()
def holding(module: nn.Module, edited: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the adapters of a model hold the edited values while they are gathered. Frozen weights may be left out.

    Args:
        module: a model with adapters.
        edited: what the hook left; whole tensors, or sharded as the module's.

    Raises:
        ValueError: a weight was changed that a checkpoint of adapters does not hold.
    """
    state, trained = module.state_dict(keep_vars=True), trained_state(module)
    changed = sorted(
        name for name, value in edited.items() if name not in trained and not _same(value, state.get(name))
    )
    if changed:
        raise ValueError(
            f"on_save_checkpoint changed or added {listed(changed)} in checkpoint['state_dict'], and a checkpoint of "
            "this model holds only its adapters. Leave the other weights as they are, or leave them out."
        )
    mine = {name: tensor.detach() for name, tensor in trained.items() if name in edited}
    before = {name: tensor.clone() for name, tensor in mine.items()}
    try:
        for name, tensor in mine.items():
            tensor.copy_(like(edited[name], tensor))
        yield
    finally:
        for name, tensor in mine.items():
            tensor.copy_(before[name])


def without_base(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of `module` without the frozen weights beside its adapters: no checkpoint of adapters holds them."""
    if lora_of(module) is None:
        return dict(state)
    frozen = module.state_dict().keys() - trained_state(module).keys()
    return {name: value for name, value in state.items() if name not in frozen}


def trained_state(module: nn.Module) -> dict[str, Any]:
    """Those tensors of a model with adapters that its checkpoints hold, by their names in its state dict."""
    held = set(map(id, trained_tensors(module).values()))
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if id(value) in held}


def _same(value: Tensor, own: Any) -> bool:
    if not isinstance(own, Tensor) or value.shape != own.shape:
        return False
    if isinstance(value, DTensor) != isinstance(own, DTensor):
        return False
    mine, given = local_tensor(own), local_tensor(value)
    shared = mine.data_ptr() == given.data_ptr() and mine.stride() == given.stride()
    return shared or (mine.device == given.device and bool(torch.equal(mine, given)))
