"""What building a model needs from a layout. Every `MeshStrategy` has it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn


class HeldDtypes(Protocol):
    """The dtypes of a run."""

    @property
    def parameters(self) -> torch.dtype:
        """The dtype that weights are trained in."""

    @property
    def compute(self) -> torch.dtype:
        """The dtype that weights compute in."""


class Layout(Protocol):
    """How a model lies on devices."""

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""

    @property
    def dtypes(self) -> HeldDtypes:
        """The dtypes of this run's precision."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object of rank `src`, on every rank. Collective."""

    def parallelize(self, model: nn.Module) -> nn.Module:
        """Lay a model (on meta or real) out on the mesh, in place."""

    def finalize_parameters(self, model: nn.Module) -> None:
        """Called once the parameters of a laid-out model have their values."""
