"""Preparing the blocks of a model that an objective holds, or that sits inside a user's own LightningModule.

A user's own module calls its models itself, so a strategy cannot run its step (`forward_backward`). It can lay out the
module's parts, and checkpoint and compile its blocks, as it does for an objective's model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import lightning.pytorch as pl
from torch import nn
from transformers import PreTrainedModel

from automodel_trainer.models.kernels.token_mlps import find_token_mlps
from automodel_trainer.nn.blocks import find_blocks
from automodel_trainer.nn.offload import HostInputs
from automodel_trainer.nn.tiles import Count, tile
from automodel_trainer.nn.wrap import Forward
from automodel_trainer.strategies.base.activation_checkpointing import (
    Mode,
    Switch,
    check_blocks,
    offload_inputs,
    switch_blocks,
)
from automodel_trainer.strategies.base.block_modes import modes_of_blocks
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
        switches: what the blocks do with their activations.
        host: holds the inputs of offloaded blocks; None if there are none.
        tiled: the MLPs that are computed in tiles.
    """

    def __init__(self) -> None:
        self.switches: WeakKeyDictionary[nn.Module, Switch] = WeakKeyDictionary()
        self._switched: dict[bool, WeakSet[nn.Module]] = {True: WeakSet(), False: WeakSet()}  # inside, outside
        self.compiled: WeakSet[nn.Module] = WeakSet()
        self.offloaded: WeakSet[nn.Module] = WeakSet()
        self.tiled: WeakSet[nn.Module] = WeakSet()
        self._to_tile: WeakSet[nn.Module] = WeakSet()
        self._whole: WeakKeyDictionary[nn.Module, Forward | None] = WeakKeyDictionary()  # forwards without tiles
        self.host: HostInputs | None = None

    def __reduce__(self) -> Any:
        return PreparedBlocks, ()  # a worker process that gets a pickled strategy builds its own model

    def set_modes(self, model: nn.Module, text: str | None, inside: Callable[[Mode | None], bool]) -> None:
        """Say how the blocks of `model` that nothing is said of yet keep their activations.

        Args:
            text: see `modes_of_blocks`.
            inside: whether blocks of a mode are checkpointed inside of what is compiled.

        Raises:
            ValueError: the mode is unknown, or the model has no blocks, or they cannot be computed again.
        """
        blocks = find_blocks(model)
        if not blocks or any(block not in self.switches for block in blocks):
            check_blocks(model, blocks, text)
        for block, mode in zip(blocks, modes_of_blocks(text, len(blocks))):
            self.switches.setdefault(block, Switch(mode, inside(mode)))

    def checkpoint(self, model: nn.Module, *, inside: bool, always: bool = False) -> None:
        """Checkpoint the blocks of `model`, as `set_modes` has said.

        Args:
            inside: whether this call comes before the blocks are compiled. Those of the other place are left alone.
            always: let all blocks look at their switches here, because these are going to change.
        """
        fresh = {
            block: switch
            for block in find_blocks(model)
            if (switch := self.switches.get(block)) is not None
            and (always or (switch.mode is not None and switch.inside == inside))
            and block not in self._switched[inside]
        }
        switch_blocks(fresh, inside=inside)
        self._switched[inside].update(fresh)

    def find_mlps(self, model: nn.Module) -> None:
        """Find what `tile` is to tile. Call it before the model is cut: then an MLP can still be recognised."""
        self._to_tile.update(find_token_mlps(model))

    @property
    def mlps(self) -> int:
        """The number of MLPs that can be tiled, or are."""
        return len(self._to_tile) + len(self.tiled)

    def tile(self, count: Count, backend: str | None, options: dict[str, Any] | None) -> None:
        """Compute the MLPs that were found in tiles; see `nn.tiles.tile`. Call it once they are cut.

        Args:
            count: the number of tiles, or "auto".
            backend, options: passed to `torch.compile`. None: tiles are not compiled.

        Raises:
            ValueError: `count` is a number and no MLP was found.
        """
        if count != "auto" and not self.mlps:
            raise ValueError(
                f"tiled_mlp={count} finds no MLP to tile: a part of a block that is made of linear layers and treats "
                "every token by itself. Set tiled_mlp=False."
            )
        compiled = None if backend is None else compiled_call(backend, options)
        for module in self._to_tile:
            self._whole[module] = module.__dict__.get("forward")
            tile(module, count, compiled)
        self.tiled.update(self._to_tile)
        self._to_tile = WeakSet()

    def untile(self) -> None:
        """Compute MLPs in one piece again."""
        for module in self.tiled:
            whole = self._whole[module]
            if whole is None:
                del module.forward
            else:
                module.forward = whole  # type: ignore[method-assign, assignment]
        self._to_tile.update(self.tiled)
        self.tiled = WeakSet()

    def offload(self, model: nn.Module, ranks: int, again: bool, always: bool = False) -> None:
        """Keep the inputs of checkpointed blocks in host memory; see `offload_inputs`. Call it after `compile`.

        Args:
            ranks: processes of this host that do the same.
            again: as `offload_inputs` has it.
            always: as `checkpoint` has it.
        """
        asked = [block for block, switch in self._of(model) if always or switch.mode == "offload"]
        fresh = [block for block in asked if block not in self.offloaded]
        if not fresh:
            return
        self.host = self.host or HostInputs(ranks=ranks)
        offload_inputs(fresh, self.host, self.switches, again)
        self.offloaded.update(fresh)

    def _of(self, model: nn.Module) -> Sequence[tuple[nn.Module, Switch]]:
        return [(block, self.switches[block]) for block in find_blocks(model) if block in self.switches]

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
