"""Which dispatcher carries the tokens: what `kernels: {dispatch: …}` says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from automodel_trainer.models.kernels import KernelLibrary, kernels_in_use
from automodel_trainer.models.kernels.dispatch import Arrived, Dispatcher
from automodel_trainer.models.kernels.registry import find, libraries
from automodel_trainer.strategies.expert.dispatch import AllToAll

MakeDispatcher = Callable[[ProcessGroup, int], Dispatcher]


def chosen_dispatcher(model: nn.Module, group: ProcessGroup, device: torch.device) -> MakeDispatcher:
    """What makes the dispatcher of a layer of `model`, and a note of it for the ledger. Collective over the ep ranks.

    "auto" is a library that all of them can use, otherwise `all_to_all`.

    Args:
        group: the ep ranks.
        device: of this rank.
    """
    in_use = kernels_in_use(model)
    name = in_use.chosen.get("dispatch", "auto")
    library = _fastest(group, device) if name == "auto" else find("dispatch", name)
    in_use.texts["dispatch"] = "all_to_all" if library is None else library.title
    if library is None:
        return AllToAll
    return partial(_SuitedToDtype if name == "auto" else _of_library, library)


def check_dispatch_unused(model: nn.Module) -> None:
    """Refuse a choice of dispatcher for a model whose experts are not split.

    Raises:
        ValueError: one was chosen.
    """
    name = kernels_in_use(model).chosen.get("dispatch", "auto")
    if find("dispatch", name) is not None:
        raise ValueError(
            f"kernels dispatch={name!r} carries tokens between ranks that hold different experts, and ep=1. "
            "Use strategy='fsdp2_ep' (or ep=…), or leave dispatch at 'auto'."
        )


def _fastest(group: ProcessGroup, device: torch.device) -> KernelLibrary | None:
    for library in libraries():
        if "dispatch" in library.offers and device.type in library.devices:
            found: list[Any] = [None] * group.size()
            dist.all_gather_object(found, library.obstacle(device) is None, group=group)
            if all(found) and not isinstance(library.dispatch(group, 1), str):
                return library
    return None


def _of_library(library: KernelLibrary, group: ProcessGroup, local: int) -> Dispatcher:
    dispatcher = library.dispatch(group, local)
    if isinstance(dispatcher, str):
        raise ValueError(
            f"kernels dispatch={library.name!r} cannot be used here: {dispatcher}. Set dispatch='all_to_all', or ep "
            "to a number of ranks that reach each other."
        )
    return dispatcher


class _SuitedToDtype:
    """A library's dispatcher for tokens in the dtypes that it takes; `all_to_all` for others."""

    def __init__(self, library: KernelLibrary, group: ProcessGroup, local: int) -> None:
        self.dtypes = library.offers["dispatch"].dtypes
        self.fast, self.plain = _of_library(library, group, local), AllToAll(group, local)

    def dispatch(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Arrived:
        """See `Dispatcher.dispatch`."""
        carrier = self.fast if hidden.dtype in self.dtypes or not self.dtypes else self.plain
        arrived = carrier.dispatch(hidden, experts, weights)
        return arrived._replace(route=(carrier, arrived.route))

    def combine(self, output: Tensor, route: Any) -> Tensor:
        """See `Dispatcher.combine`."""
        carrier, own = route
        return carrier.combine(output, own)  # type: ignore[no-any-return]
