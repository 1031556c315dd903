"""Preparing the blocks of a model that an objective holds, or that sits inside a user's own LightningModule.

A user's own module calls its models itself, so a strategy cannot run its step (`forward_backward`). It can lay out the
module's parts, and checkpoint and compile its blocks, as it does for an objective's model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal
from weakref import WeakSet

import lightning.pytorch as pl
from torch import nn
from transformers import PreTrainedModel

from automodel_trainer.models.kernels.token_mlps import find_token_mlps
from automodel_trainer.nn.blocks import find_blocks
from automodel_trainer.nn.offload import HostInputs
from automodel_trainer.nn.tiles import Count, tile
from automodel_trainer.strategies.base.activation_checkpointing import (
    Mode,
    apply_activation_checkpointing,
    offload_inputs,
)
from automodel_trainer.strategies.base.compile import compile_blocks, compiled_call


def parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """The children that are laid out one by one: those that hold parameters. Containers are replaced by their items."""
    for child in module.children():
        if next(child.parameters(), None) is None:
            continue
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # containers have no forward of their own
            yield from parts_of(child)
        else:
            yield child


def outermost(module: nn.Module, kind: type[nn.Module]) -> list[Any]:
    """The outermost modules of type `kind` in `module`, which may be `module` itself."""
    if isinstance(module, kind):
        return [module]
    return [found for child in module.children() for found in outermost(child, kind)]


class PreparedBlocks:
    """Checkpoints and compiles blocks, tiles their MLPs and offloads their inputs, each of them at most once.

    Attributes:
        host: holds the inputs of offloaded blocks; None if there are none.
        tiled: the MLPs that are computed in tiles.
    """

    def __init__(self) -> None:
        self.checkpointed: WeakSet[nn.Module] = WeakSet()
        self.compiled: WeakSet[nn.Module] = WeakSet()
        self.offloaded: WeakSet[nn.Module] = WeakSet()
        self.tiled: WeakSet[nn.Module] = WeakSet()
        self._to_tile: WeakSet[nn.Module] = WeakSet()
        self.host: HostInputs | None = None

    def __reduce__(self) -> Any:
        return PreparedBlocks, ()  # a worker process that gets a pickled strategy builds its own model

    def checkpoint(self, model: nn.Module, mode: Mode) -> None:
        """Checkpoint the blocks of `model` that are not checkpointed yet; see `apply_activation_checkpointing`.

        Raises:
            ValueError: the mode is unknown, or the model has no blocks.
        """
        blocks = find_blocks(model)
        fresh = [block for block in blocks if block not in self.checkpointed]
        if fresh or not blocks:  # without blocks the call raises
            apply_activation_checkpointing(model, mode, fresh)
        self.checkpointed.update(fresh)

    def find_mlps(self, model: nn.Module) -> None:
        """Find what `tile` is to tile. Call it before the model is cut: then an MLP can still be recognised."""
        self._to_tile.update(find_token_mlps(model))

    def tile(self, count: Count, backend: str | None, options: dict[str, Any] | None) -> None:
        """Compute the MLPs that were found in tiles; see `nn.tiles.tile`. Call it once they are cut.

        Args:
            count: the number of tiles, or "auto".
            backend, options: passed to `torch.compile`. None: tiles are not compiled.

        Raises:
            ValueError: `count` is a number and no MLP was found.
        """
        if count != "auto" and not (self._to_tile or self.tiled):
            raise ValueError(
                f"tiled_mlp={count} finds no MLP to tile: a part of a block that is made of linear layers and treats "
                "every token by itself. Set tiled_mlp=False."
            )
        compiled = None if backend is None else compiled_call(backend, options)
        for module in self._to_tile:
            tile(module, count, compiled)
        self.tiled.update(self._to_tile)
        self._to_tile = WeakSet()

    def offload(self, model: nn.Module, ranks: int) -> None:
        """Keep the inputs of checkpointed blocks in host memory; see `offload_inputs`. Call it after `compile`.

        Args:
            ranks: processes of this host that do the same.
        """
        fresh = [block for block in find_blocks(model) if block not in self.offloaded]
        self.host = self.host or HostInputs(ranks=ranks)
        offload_inputs(fresh, self.host)
        self.offloaded.update(fresh)

    def compile(
        self, model: nn.Module, backend: str, options: dict[str, Any] | None, asked: bool | Literal["auto"]
    ) -> None:
        """Compile the blocks of `model` that are not compiled yet; see `compile_blocks`.

        With `asked="auto"`, only the Hugging Face models inside a user's own module are compiled.

        Raises:
            ValueError: `asked` is True and the model has no blocks.
        """
        own = asked == "auto" and isinstance(model, pl.LightningModule)
        blocks = [b for part in (outermost(model, PreTrainedModel) if own else [model]) for b in find_blocks(part)]
        fresh = [block for block in blocks if block not in self.compiled]
        if fresh or (not blocks and asked is True):
            compile_blocks(model, backend, fresh, options)
        self.compiled.update(fresh)
