"""A checkpoint that holds more than the model that was chosen: what would be lost, and the class that keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from automodel_trainer.models._transformers import ignores, places_of
from automodel_trainer.models.auto_classes import WITH_PICTURES, auto_class_that_builds
from automodel_trainer.nn.text import listed


def check_unused(model: PreTrainedModel, unused: set[str], folder: Path, trust_remote_code: bool = False) -> None:
    """Refuse to train a part of a checkpoint, because the rest would be missing in what is saved.

    The class that the checkpoint was saved by tells which weights belong to its body. A head may be left behind: it is
    what another objective replaces.

    Args:
        model: the chosen model.
        unused: names in the files that the model has no place for.
        folder: that the files are in.
        trust_remote_code: read a config whose code comes with the checkpoint.

    Raises:
        ValueError: weights would be lost; it names the class that keeps them.
    """
    if not unused or not (folder / "config.json").is_file():
        return
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    keeper: Any = getattr(transformers, name, None)
    if name in {cls.__name__ for cls in type(model).__mro__} or not _is_model(keeper):
        return
    try:
        with torch.device("meta"):
            whole = keeper(config)
    except ImportError:  # it needs a package that the chosen model does not: then nobody knows what belongs to its head
        lost = sorted(unused)
    else:
        head = _head_names(whole)
        places = places_of(whole, (n for n in sorted(unused) if not ignores(whole, n)))
        lost = [n for n, place in places.items() if place not in head]
    if lost:
        auto = auto_class_that_builds(name)
        how = f"{auto} builds it: write an objective with auto_class = {auto!r}. " if auto else ""
        if auto == WITH_PICTURES:
            how = "ImageTextModule trains it whole. "
        raise ValueError(
            f"{folder} is a {name}. {_class_name(model)} has no place for {len(lost)} of its weights "
            f"({listed(lost, 3)}), so they would be missing in what is saved. {name} keeps them. {how}To train "
            f"{_class_name(model)} alone and lose them, set allow_unused_weights=True."
        )


def _is_model(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, PreTrainedModel)


def _head_names(model: PreTrainedModel) -> set[str]:
    """Names of the weights that are no part of a model's body."""
    head = model.get_output_embeddings()
    inside = {id(p) for p in head.parameters()} if head is not None else set()
    prefix = f"{model.base_model_prefix}."
    state = dict(model.named_parameters(remove_duplicate=False))
    has_body = any(name.startswith(prefix) for name in state)
    return {n for n, p in state.items() if id(p) in inside or (has_body and not n.startswith(prefix))}


def _class_name(model: PreTrainedModel) -> str:
    return type(model).__name__.removeprefix("FSDP")  # FSDP2 puts a class of its own before the model's
