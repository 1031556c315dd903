"""Try out, on a small copy and in one process, whether a model reads weights outside of the layers that hold them.

Tensor parallel makes every parameter a DTensor, and lets a layer see its own as plain tensors while it runs. Code of
the model around its layers would meet a DTensor among plain tensors, which torch refuses.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer.models.rehearsal import logits_of, rehearse
from automodel_trainer.nn._torch import pytree
from automodel_trainer.nn.wrap import wrap
from automodel_trainer.strategies.tensor.local_parameters import readers


def check_reads(model: PreTrainedModel) -> None:
    """Check that a model reads its weights only in the forwards of the layers that hold them.

    Raises:
        ValueError: it does not.
    """
    found = rehearse(model, "reads", _with_weights_away)
    if found is not None:
        raise ValueError(
            f"tp > 1 cuts weights, which then only the layers that hold them can read, and a small copy of "
            f"{type(model).__name__} {found}. Set tp=1, and shard with fsdp2 instead."
        )


class _Away(Tensor):
    """A parameter as seen from outside of its layer: like a DTensor, it does not mix with plain tensors."""

    of: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        name = next(tensor.of for tensor in tensors if isinstance(tensor, _Away))
        if any(tensor.ndim > 0 for tensor in tensors if type(tensor) is not _Away):
            raise RuntimeError(f"{name} is read outside of its layer")
        result = super().__torch_function__(func, types, args, kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, _Away):
                leaf.of = name
        return result


def _with_weights_away(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits for ids `[b, s]`, where parameters are plain tensors in the layers that hold them and nowhere else."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for reader, parts in readers(model):
        wrap(reader, _seeing([(part, key, p) for part in parts for key, p in part.named_parameters(recurse=False)]))
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            away = parameter.detach().as_subclass(_Away)
            away.of = names[parameter]
            module._parameters[key] = away  # type: ignore[assignment]
    return logits_of(model(input_ids=ids))


def _seeing(parameters: list[tuple[nn.Module, str, nn.Parameter]]) -> Any:
    def around(original: Any, *args: Any, **kwargs: Any) -> Any:
        before = [module._parameters[key] for module, key, _ in parameters]
        try:
            for module, key, parameter in parameters:
                module._parameters[key] = parameter
            return original(*args, **kwargs)
        finally:
            for (module, key, _), value in zip(parameters, before):
                module._parameters[key] = value

    return around
