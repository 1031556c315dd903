"""Which dispatcher carries the tokens: what `kernels: {dispatch: …}` says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torch.distributed import ProcessGroup

from automodel_trainer.models.kernels import KernelLibrary, kernels_in_use
from automodel_trainer.models.kernels.dispatch import Dispatcher
from automodel_trainer.models.kernels.registry import find
from automodel_trainer.strategies.expert.dispatch import AllToAll


def chosen_dispatcher(model: nn.Module) -> Callable[[ProcessGroup, int], Dispatcher]:
    """What makes the dispatcher of a layer of `model`, from the ep ranks and the number of experts of each."""
    library = _library(model)
    return AllToAll if library is None else partial(_of_library, library)


def check_dispatch_unused(model: nn.Module) -> None:
    """Refuse a choice of dispatcher for a model whose experts are not split.

    Raises:
        ValueError: one was chosen.
    """
    if (library := _library(model)) is not None:
        raise ValueError(
            f"kernels dispatch={library.name!r} carries tokens between ranks that hold different experts, and ep=1. "
            "Use strategy='fsdp2_ep' (or ep=…), or leave dispatch at 'auto'."
        )


def _library(model: nn.Module) -> KernelLibrary | None:
    name = kernels_in_use(model).chosen.get("dispatch")
    return None if name is None else find("dispatch", name)


def _of_library(library: KernelLibrary, group: ProcessGroup, local: int) -> Dispatcher:
    dispatcher = library.dispatch(group, local)
    if isinstance(dispatcher, str):
        raise ValueError(
            f"kernels dispatch={library.name!r} cannot be used here: {dispatcher}. Set dispatch='all_to_all', or ep "
            "to a number of ranks that reach each other."
        )
    return dispatcher
