"""Arguments that are dataclasses may be given as dicts, in Python as in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from automodel_trainer.nn.text import did_you_mean

T = TypeVar("T")


def as_config(kind: type[T], value: Any, name: str) -> T:
    """A mapping as a dataclass; a dataclass of that kind as it is.

    Args:
        kind: the dataclass.
        value: what the user gave.
        name: of the argument, for the message.

    Raises:
        ValueError: the mapping has a key that is no field, or the value is something else.
    """
    if isinstance(value, kind):
        return value
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{name}={value!r} is a {type(value).__name__}. Allowed: {kind.__name__}(…), or a dict of its options: "
            f"{', '.join(known)}."
        )
    for key in value:
        if key not in known:
            raise ValueError(
                f"{name}: {key!r} is not an option of {kind.__name__}.{did_you_mean(str(key), known)} "
                f"Allowed: {', '.join(known)}."
            )
    return kind(**value)
