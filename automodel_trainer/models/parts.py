"""The parts of a vision-language model: the vision tower, the language model, and the projector between them.

Transformers says where a model's encoders and its decoder are. What is in none of them is the projector.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from automodel_trainer.models.record import record_of, recorded
from automodel_trainer.nn.towers import towers_of

PARTS = ("vision", "projector", "language")


class ModelParts:
    """Which part each parameter of a vision-language model belongs to.

    Args:
        model: on meta or real, laid out or not.

    Raises:
        ValueError: transformers finds no image encoder in it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        towers, decoder = towers_of(model), model.get_decoder()
        names = {id(module): name for name, module in model.named_modules()}
        if not towers:
            raise ValueError(
                f"{type(model).__name__} has no image encoder that transformers knows (get_encoder(modality='image')), "
                "so its parts cannot be told apart. Use CausalLMModule for a model of text alone."
            )
        self._vision = [names[id(tower)] for tower in towers]
        language = [decoder] if decoder is not model else []
        language += [m for m in (model.get_output_embeddings(), model.get_input_embeddings()) if m is not None]
        self._language = [names[id(module)] for module in language]

    def of(self, name: str) -> str:
        """The part of a parameter or module with this name: "vision" (every tower), "projector" or "language"."""
        if any(_inside(name, tower) for tower in self._vision):  # first: some decoders hold the tower
            return "vision"
        return "language" if any(_inside(name, part) for part in self._language) else "projector"

    def select(self, names: Iterable[str], wanted: Sequence[str], option: str) -> set[str]:
        """The names that `wanted` means: parts, or globs over names.

        Args:
            names: of parameters.
            wanted: "vision", "projector", "language", or globs.
            option: what is set so, for the message.

        Raises:
            ValueError: one of them means nothing.
        """
        known, found = list(names), set()
        for pattern in wanted:
            meant = {name for name in known if self.matches(name, pattern)}
            if not meant:
                raise ValueError(
                    f"{option}: {pattern!r} is no part of this model. Allowed: {', '.join(PARTS)}, or a glob over the "
                    f"names of parameters, such as {known[0].rpartition('.')[0] + '.*'!r}."
                )
            found |= meant
        return found

    def matches(self, name: str, pattern: str) -> bool:
        """Whether a part or a glob over names means this parameter."""
        return self.of(name) == pattern if pattern in PARTS else fnmatchcase(name, pattern)


@dataclass(frozen=True)
class FrozenParts:
    """An entry of a model's record: what the user froze.

    Attributes:
        asked: parts and globs, as they were given.
        names: of the parameters that were frozen.
        apart: parts that `all-linear` leaves without adapters.
    """

    asked: tuple[str, ...]
    names: frozenset[str]
    apart: frozenset[str]


def freeze_parts(model: PreTrainedModel, asked: Sequence[str]) -> None:
    """Freeze parts of a model, before adapters are added and before it is laid out.

    Frozen weights get no adapters either. While the tower is frozen, `all-linear` means the language model.

    Args:
        model: on meta or real.
        asked: "vision", "projector", "language", or globs over the names of parameters.

    Raises:
        ValueError: one of them means nothing, or nothing is left to train.
    """
    parts = ModelParts(model)
    parameters = dict(model.named_parameters())
    frozen = parts.select(parameters, asked, "freeze")
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"freeze={tuple(asked)} leaves nothing to train. Leave a part out: {', '.join(PARTS)}.")
    still = all(name in frozen for name in parameters if parts.of(name) == "vision")
    apart = frozenset({"vision", "projector"} if still else ())
    record_of(model).keep(FrozenParts(tuple(asked), frozenset(frozen), apart))


def frozen_parts(model: nn.Module) -> FrozenParts | None:
    """What was frozen by `freeze_parts`."""
    return recorded(model, FrozenParts)


def describe_frozen(model: nn.Module) -> str | None:
    """For the ledger: which parts are frozen, and by which option; None if `freeze` says nothing."""
    frozen = frozen_parts(model)
    return None if frozen is None else f"{', '.join(frozen.asked)} (freeze={list(frozen.asked)})"


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")
