"""Embeddings that were resized: an adapter holds them too, as PEFT's does, because the base's files do not fit them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from automodel_trainer.models._transformers import forget_ties, tied_weight_names
from automodel_trainer.models.limits import vocabulary_size
from automodel_trainer.models.record import record_of, recorded
from automodel_trainer.models.sidecars import source_folder


@dataclass(frozen=True)
class UntiedHead:
    """The base ties these two weights, and the adapter trains one of them apart. An entry of the model's record.

    Args:
        name: the weight that the base's files do not hold.
        source: the weight in the files whose values it has.
    """

    name: str
    source: str


def untied_head(model: nn.Module) -> UntiedHead | None:
    """The weight that is tied in a model's base and not in the model."""
    return recorded(model, UntiedHead)


def untie_as_peft(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Take tied embeddings apart if an adapter on disk holds one of the two.

    PEFT trains a copy of a module in `modules_to_save`. A module that is tied to it keeps the weight of the base.

    Args:
        model: the base model, on meta or real, not laid out yet.
        tensors: the adapter's, by their names in the model.
    """
    for name, source in tied_weight_names(model).items():
        if (name in tensors) == (source in tensors):
            continue
        owner, _, key = name.rpartition(".")
        weight = model.get_parameter(source)
        if model.get_parameter(name) is weight:
            setattr(model.get_submodule(owner), key, nn.Parameter(weight.detach().clone(), weight.requires_grad))
        forget_ties(model)
        record_of(model).keep(UntiedHead(name, source))
        return


@dataclass(frozen=True)
class SavedEmbeddings:
    """Names of parameters that are saved with the adapter, though they may be frozen. An entry of the model's record.

    Args:
        names: weights of the input and output embeddings; both names of a tied one.
        from_adapter: whether an adapter on disk holds them, so that they are not read from the base's files.
    """

    names: tuple[str, ...]
    from_adapter: bool = False


def saved_embeddings(model: nn.Module) -> tuple[str, ...]:
    """Names of the embeddings that are saved with a model's adapter."""
    found = recorded(model, SavedEmbeddings)
    return () if found is None else found.names


def embeddings_of_adapter(model: nn.Module) -> set[str]:
    """Names of the embeddings in a model, or in a pipeline stage, that come from the adapter that it continues from."""
    found = recorded(model, SavedEmbeddings)
    if found is None or not found.from_adapter:
        return set()
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if name in found.names}


def note_resized(model: PreTrainedModel) -> None:
    """Save a model's embeddings with its adapter if there are more or fewer than in the folder it came from."""
    source = source_folder(model)
    if source is None:
        return
    if vocabulary_size(type(model.config).from_pretrained(source)) != vocabulary_size(model.config):
        record_of(model).keep(SavedEmbeddings(tuple(_names(model))))


def fit_embeddings(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Resize a model's embeddings to those that an adapter on disk holds, if it holds any.

    Args:
        model: the base model, on meta or real, not laid out yet.
        tensors: the adapter's, by their names in the model.
    """
    held = [name for name in _names(model) if name in tensors]
    if not held:
        return
    rows = tensors[held[0]].shape[0]
    if rows != vocabulary_size(model.config, model):
        model.resize_token_embeddings(rows, mean_resizing=False)  # the values come from the adapter
    record_of(model).keep(SavedEmbeddings(tuple(held), from_adapter=True))


def _names(model: PreTrainedModel) -> list[str]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    inside = {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters()}
    return [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in inside]
