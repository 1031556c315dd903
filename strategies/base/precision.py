"""`Trainer(precision=...)`, and how a sharded strategy applies it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from automodel_trainer.nn._torch import is_persistent
from automodel_trainer.strategies.base.clip import clip_grads_, total_grad_norm

_ALIASES = {
    None: "32-true",
    "fp32": "32-true",
    "32": "32-true",
    32: "32-true",
    "bf16": "bf16-mixed",
    "fp64": "64-true",
    "64": "64-true",
    64: "64-true",
}


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of one precision.

    Args:
        parameters: dtype of the parameters, and so of the optimizer state.
        compute: dtype of the forward.
    """

    parameters: torch.dtype
    compute: torch.dtype

    @property
    def mixed(self) -> bool:
        """Whether parameters are master weights that are cast for the forward."""
        return self.parameters != self.compute


_DTYPES = {
    "32-true": Dtypes(torch.float32, torch.float32),
    "bf16-mixed": Dtypes(torch.float32, torch.bfloat16),
    "bf16-true": Dtypes(torch.bfloat16, torch.bfloat16),
    "64-true": Dtypes(torch.float64, torch.float64),
}


def canonical_precision(precision: str | int | None) -> str:
    """Lightning's name for a precision: `bf16` is `bf16-mixed` (fp32 master weights), `fp32` is `32-true`."""
    return _ALIASES.get(precision, str(precision))


def dtypes_of(precision: str) -> Dtypes:
    """The dtypes of a precision, by Lightning's name for it.

    Raises:
        ValueError: sharded training does not offer this precision.
    """
    if precision not in _DTYPES:
        raise ValueError(
            f"precision={precision!r} is not supported by this strategy. Allowed: fp32, bf16 (fp32 master weights, "
            "bf16 compute), bf16-true (everything in bf16), 64-true. fp16 would need loss scaling: use bf16."
        )
    return _DTYPES[precision]


def fsdp_policy(dtypes: Dtypes) -> MixedPrecisionPolicy:
    """FSDP2's policy: parameters are cast when gathered, gradients are reduced in fp32 (or wider)."""
    # A dtype of None means "as it is". FSDP2 then skips the cast.
    reduce = torch.promote_types(dtypes.parameters, torch.float32)
    if not dtypes.mixed:
        return MixedPrecisionPolicy(reduce_dtype=reduce if reduce != dtypes.parameters else None)
    return MixedPrecisionPolicy(param_dtype=dtypes.compute, reduce_dtype=reduce)


def hold_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters and persistent buffers to `dtype`, in place.

    Non-persistent buffers keep their dtype: rotary frequencies in bf16 are off by whole turns after a few thousand
    tokens.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            if buffer.is_floating_point() and is_persistent(child, name):
                child._buffers[name] = buffer.to(dtype)


def check_plugin(plugin: Precision) -> None:
    """Refuse a precision plugin of the user's own, which the strategy would otherwise replace silently.

    Raises:
        ValueError: `plugin` is neither Lightning's nor this project's.
    """
    if not type(plugin).__module__.startswith(("lightning.", __name__.partition(".")[0] + ".")):
        raise ValueError(
            f"{type(plugin).__name__} was given as a plugin, but this strategy casts parameters itself (FSDP2's "
            "policy). Use Trainer(precision='fp32' | 'bf16' | 'bf16-true' | '64-true'), or strategy='ddp'."
        )


class MeshPrecision(Precision):
    """The precision of a strategy that casts parameters itself (FSDP2's policy). Only a user's own module is autocast.

    Args:
        precision: Lightning's name for it, such as "bf16-mixed".

    Raises:
        ValueError: sharded training does not offer this precision.
    """

    def __init__(self, precision: str) -> None:
        self.precision = precision  # type: ignore[assignment]
        self.dtypes = dtypes_of(precision)
        self.plain: torch.dtype | None = None  # the one dtype of a user's own module; None: inputs are not cast
        self.autocast_on: str | None = None  # the device on which a user's own module is autocast

    def convert_own(self, module: nn.Module, device: torch.device) -> None:
        """Prepare a user's own module for this precision, in place. An objective's model handles this itself.

        Without master weights (bf16-true, 64-true) the module is cast. It computes in the dtype of its parameters, so
        its inputs and the tensors that it creates get that dtype too. With master weights (bf16-mixed) its steps are
        autocast, as under Lightning's own strategies: it may have layers and losses that need fp32.
        """
        if self.dtypes.mixed:
            self.autocast_on = device.type
        elif self.dtypes.parameters != torch.float32:
            self.plain = self.dtypes.parameters
            hold_in(module, self.plain)

    def convert_input(self, data: Any) -> Any:
        """Cast the floating-point tensors of a batch for a user's own module; see `convert_own`."""
        dtype = self.plain
        if dtype is None:
            return data
        return apply_to_collection(
            data, Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
        )

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Autocast a user's own module, or let its new tensors get its dtype; see `convert_own`."""
        if self.autocast_on is not None:
            with torch.autocast(self.autocast_on, self.dtypes.compute):
                yield
            return
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.plain or before)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clip for a user's automatic optimization, by the norm over all shards and all plain parameters."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        clip_grads_(parameters, float(clip_val), total_grad_norm(parameters))
