"""Sequence parallel: between cut layers, each rank works on its part of the sequence.

From the first block of a stack to the last, hidden states are `[b, s / tp, h]`. Norms, dropout and residuals work on
parts. Attention, MLPs and everything else in a block see the whole sequence: it is gathered at their entry and
reduce-scattered at their exit, which replaces the all-reduces of plain tensor parallel. If tp does not divide the
length, it is padded for the collectives, and the padding is removed before any module sees it.

Some decoders add features of pictures to the hidden states between blocks. In those the sequence is whole there: it is
split anew at every block.

Source: arXiv 2205.05198.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_args

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from automodel_trainer.models._transformers import has_tower
from automodel_trainer.models.stage_names import own_runs_of_layers
from automodel_trainer.nn.wrap import wrap
from automodel_trainer.strategies.tensor.collectives import gather_sequence, slice_sequence
from automodel_trainer.strategies.tensor.layers import on_hidden_states, on_output
from automodel_trainer.strategies.tensor.plan import ROWS, TensorPlan

_SUMMING = {"moe_tp_experts", "all_reduce"}  # styles that sum over ranks themselves, so their output is whole


class SequenceParallel:
    """Plans where a model's sequence is split (on creation), and wraps its blocks (`install`).

    Args:
        plan: the model's plan. Its `summed` grows by the parameters that work on parts.
        joint: names of modules that sum the gradient of their input, see `joint_entries`.
        group: the tp ranks.

    Attributes:
        gathering: names of modules that gather their input. For those in `joint`, the gather's backward also sums the
            gradient.
        scattering: names of layers that leave their output as parts of the sequence.
    """

    def __init__(self, model: nn.Module, plan: TensorPlan, joint: set[str], group: ProcessGroup) -> None:
        self.group, self.plan, self.joint, self._model = group, plan, joint, model
        self.length = 0  # whole length of the sequences that are running through the stack
        self.gathering: set[str] = set()
        self.scattering: set[str] = set()
        self._modules = dict(model.named_modules())
        self._scatters: dict[str, bool] = {}
        self._stacks = [stack for stack in stacks(model) if any(n.startswith(f"{stack}.") for n in plan.modules)]
        for stack in self._stacks:
            for name, _ in self._modules[stack].named_children():
                self._plan_block(f"{stack}.{name}")

    def _plan_block(self, name: str) -> None:
        block = self._modules[name]
        self.plan.summed |= {id(p) for p in block.parameters(recurse=False)}  # the block itself works on parts
        for key, child in block.named_children():
            self._plan_part(f"{name}.{key}", child)

    def _plan_part(self, name: str, part: nn.Module) -> None:
        """Decide for one child of a block whether it works on parts, or gathers the sequence and how it scatters it."""
        if next(part.parameters(), None) is None:
            return
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)):  # containers have no forward of their own
            for key, child in part.named_children():
                self._plan_part(f"{name}.{key}", child)
        elif works_on_parts(part):
            self.plan.summed |= {id(p) for p in part.parameters()}
        else:
            self.gathering.add(name)
            last = self._only_rows(name)
            self._scatters[name] = last is not None
            if last is not None:
                self.scattering.add(last)
                bias = getattr(self._modules[last], "bias", None)  # it is added to a part of the sequence
                self.plan.summed |= {id(bias)} if bias is not None else set()

    def _only_rows(self, name: str) -> str | None:
        """The one row-cut layer of a module, if it is a direct child and nothing else sums over ranks; else None.

        Such a layer is the module's last, so it can reduce-scatter the module's output.
        """
        styles = {child: style for child, style in self.plan.modules.items() if child.startswith(f"{name}.")}
        rows = [child for child, style in styles.items() if style in ROWS]
        whole = any(style in _SUMMING for style in styles.values())
        return rows[0] if len(rows) == 1 and not whole and rows[0].rpartition(".")[0] == name else None

    def install(self) -> None:
        """Wrap the modules that gather, and the first and last block between which the sequence is split."""
        for name in self.gathering:
            wrap(self._modules[name], self._gathering(partial=name in self.joint, scatters=self._scatters[name]))
        apart = adds_between_layers(self._model)
        for stack in self._stacks:
            blocks = list(self._modules[stack].children())
            # With several pipeline stages on a rank, hidden states enter and leave the stack once per stage.
            runs = own_runs_of_layers(self._model, stack) or [range(len(blocks))]
            for layers in [range(i, i + 1) for run in runs for i in run] if apart else runs:
                wrap(blocks[layers[0]], self._first)
                wrap(blocks[layers[-1]], self._last)

    def _first(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = on_hidden_states(self._enter, args, kwargs)
        return original(*args, **kwargs)

    def _enter(self, x: Tensor) -> Tensor:
        """This rank's part `[b, ceil(s / tp), h]` of the hidden states `[b, s, h]`."""
        if x.ndim != 3:
            raise ValueError(
                f"sequence_parallel=True needs hidden states [b, s, h], and this model has {list(x.shape)}. Set "
                "sequence_parallel=False."
            )
        self.length = x.shape[1]
        return slice_sequence(x, self.group)

    def _last(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return on_output(lambda x: gather_sequence(x, self.group, self.length), original(*args, **kwargs))

    def _whole_length(self, part: int) -> int:
        """The length of what ranks gather of parts of this length: the sequence's, or that of a tile of all parts."""
        size = self.group.size()
        return self.length if part == -(-self.length // size) else part * size

    def _gathering(self, partial: bool, scatters: bool) -> Callable[..., Any]:
        """A wrapper that gathers a module's hidden states, and splits its output unless one of its layers does."""

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            shape: list[int] = []  # `[b, s, -1]` of the gathered hidden states

            def gather(x: Tensor) -> Tensor:
                length = self._whole_length(x.shape[1])
                shape[:] = [x.shape[0], length, -1]
                return gather_sequence(x, self.group, length, partial)

            args, kwargs = on_hidden_states(gather, args, kwargs)
            output = original(*args, **kwargs)
            if scatters:
                return output
            # Some modules (experts) return all tokens as [b·s, h] and let the block restore the shape.
            return on_output(lambda x: slice_sequence(x.reshape(shape), self.group), output)

        return forward


def works_on_parts(module: nn.Module) -> bool:
    """Whether a module treats every token by itself, as norms over the width do. Others get the whole sequence."""
    name = type(module).__name__.lower()
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or "rmsnorm" in name or "layernorm" in name


def adds_between_layers(model: nn.Module) -> bool:
    """Whether a decoder takes features of pictures for several of its layers: its forward has a list of tensors."""
    if not has_tower(model):
        return False
    named = inspect.signature(type(model.get_decoder()).forward).parameters.values()  # type: ignore[operator]
    return any(list[Tensor] in get_args(parameter.annotation) for parameter in named)


def stacks(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the outermost `nn.ModuleList`s that hold parameters, as in `find_blocks`."""
    for key, child in model.named_children():
        if not isinstance(child, nn.ModuleList):
            yield from stacks(child, f"{prefix}{key}.")
        elif next(child.parameters(), None) is not None:
            yield f"{prefix}{key}"
